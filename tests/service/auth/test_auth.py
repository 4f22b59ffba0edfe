"""Keys, scopes, and who may reach a service that has none."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.auth.authorization import ROUTE_SCOPES
from service.auth.keys import KeyFile, KeyFileError, Keyring, Scope
from service.errors import KeysUnreadable
from service.kit.urls import is_loopback
from service.settings import SettingsError, load_settings
from tests.service.conftest import Serve

SCOPES: tuple[Scope, ...] = ("query", "enroll", "admin")
NOBODY = "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10"


@dataclass
class Guarded:
    """A service with one key per scope."""

    http: httpx.Client
    file: KeyFile
    tokens: dict[Scope, str]


@pytest.fixture(scope="module")
def guarded(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    file = KeyFile(folder / "keys.json")
    tokens = {scope: file.create(scope, [scope])[1] for scope in SCOPES}
    # Beyond loopback: allowed, because there are keys.
    with serve(folder / "data", api_keys_file=file.path, host="0.0.0.0") as url:
        address = url.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=address, trust_env=False, timeout=60) as http:
            yield Guarded(http, file, tokens)


def call(guarded: Guarded, method: str, path: str, token: str | None) -> httpx.Response:
    path = (
        path.replace("{id}", NOBODY).replace("{asset}", "docs.js").replace("{path}", "index.html")
    )
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return guarded.http.request(method, path, headers=headers)


@pytest.mark.parametrize(("method", "path"), ROUTE_SCOPES)
def test_every_route_with_every_scope(guarded: Guarded, method: str, path: str) -> None:
    needed = ROUTE_SCOPES[method, path]
    anonymous = call(guarded, method, path, None)
    if needed is None:
        assert anonymous.status_code == 200
        return
    assert anonymous.status_code == 401
    assert anonymous.headers["www-authenticate"] == "Bearer"
    assert anonymous.json()["code"] == "unauthorized"
    for scope in SCOPES:
        answer = call(guarded, method, path, guarded.tokens[scope])
        if scope == needed:  # let in: what is wrong now is only what was sent
            assert answer.status_code in (200, 404, 415, 422)
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")


def test_openapi_says_which_routes_need_a_key(guarded: Guarded, http: httpx.Client) -> None:
    document = guarded.http.get("/openapi.json").json()
    without = http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needed = ROUTE_SCOPES[method.upper(), path] is not None
            assert ("security" in operation) == needed
            assert "security" not in without["paths"][path][method]


def test_only_bearer_keys_that_exist_are_let_in(guarded: Guarded) -> None:
    good = guarded.tokens["query"]
    for header in (
        "",
        "Bearer",
        f"Basic {good}",
        f"Bearer {good}x",
        f"Bearer {good[:-1]}",
        f"Bearer {good.upper()}",
        f"bearer{good}",
        "Bearer " + "x" * 4000,
    ):
        answer = guarded.http.get("/gallery", headers={"Authorization": header})
        assert answer.status_code == 401, header
    raw = [(b"Authorization", b"Bearer \xff\xfe")]
    assert guarded.http.get("/gallery", headers=raw).status_code == 401
    assert guarded.http.get(f"/gallery?api_key={good}").status_code == 401
    assert guarded.http.get("/gallery", headers={"Authorization": f"Bearer {good}"}).is_success


def test_a_body_is_not_read_before_the_key_is_known(guarded: Guarded) -> None:
    answer = guarded.http.post("/gallery", files={"image": bytes(1000)})
    assert answer.json()["code"] == "unauthorized"


def test_keys_take_effect_and_end_without_a_restart(guarded: Guarded) -> None:
    key, token = guarded.file.create("short-lived", ["query"])
    headers = {"Authorization": f"Bearer {token}"}
    assert guarded.http.get("/gallery", headers=headers).status_code == 200
    guarded.file.revoke(key.id)
    assert guarded.http.get("/gallery", headers=headers).status_code == 401


def damages(path: Path) -> Iterator[None]:
    """What may stand where a file of keys was, one after the other."""
    whole = path.read_bytes()
    key = json.loads(whole)["keys"][0]
    texts = {
        "empty": "",
        "cut": whole[: len(whole) // 2].decode(),
        "garbled": "\x00\xff not json",
        "deep": "[" * 100_000 + "]" * 100_000,
        "no number": '{"keys": NaN}',
        "long": " " * 5_000_000,
        "named twice": '{"keys": [], ' + whole.decode().lstrip()[1:],
        **{
            f"{name}: {value!r}": json.dumps({"keys": [{**key, name: value}]})
            for name, value in (
                ("sha256", "é" * 64),
                ("sha256", "0" * 63),
                ("rate", "often"),
                ("rate", "0/minute"),
                ("scopes", "query"),
                ("scopes", ["root"]),
                ("created_at", "yesterday"),
                ("id", None),
                ("note", "x"),
            )
        },
        "revoked only once": json.dumps({"keys": [key, {**key, "id": "other"}]}),
    }
    for text in texts.values():
        path.write_text(text, encoding="latin-1")
        yield
    path.unlink()
    yield
    path.mkdir()
    yield
    path.rmdir()
    os.mkfifo(path)
    yield
    path.unlink()
    path.symlink_to("/dev/zero")
    yield
    path.unlink()
    path.write_bytes(whole)


def test_without_a_readable_file_nobody_is_let_in(guarded: Guarded) -> None:
    headers = {"Authorization": f"Bearer {guarded.tokens['query']}"}
    for _ in damages(guarded.file.path):
        for answer in (
            guarded.http.get("/gallery", headers=headers),
            guarded.http.get("/readyz"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "keys_unreadable")
        assert guarded.http.get("/livez").status_code == 200
    assert guarded.http.get("/gallery", headers=headers).status_code == 200
    assert guarded.http.get("/readyz").status_code == 200


def test_the_commands_tell_what_is_wrong_with_a_file_of_keys(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.create("one", ["query"], "5/second;100/hour")
    for _ in damages(file.path):
        with pytest.raises(KeyFileError, match=r"keys\.json"):
            file.read()
    assert [key.rate for key in file.read()] == ["5/second;100/hour"]


def test_an_older_file_that_is_put_back_is_noticed(tmp_path: Path) -> None:
    """Even with the time, the size and the place of the one that was read."""
    file = KeyFile(tmp_path / "keys.json")
    _, first = file.create("one", ["query"])
    keyring = Keyring(file.path)
    assert keyring.find(first) is not None
    status = file.path.stat()
    other = file.path.read_text().replace(file.read()[0].sha256, "0" * 64)
    file.path.write_text(other)
    os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert keyring.find(first) is None
    file.path.unlink()
    with pytest.raises(KeysUnreadable):
        keyring.find(first)


def test_the_file_holds_no_key_and_is_private(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "new" / "keys.json")
    _, token = file.create("desk", ["query", "enroll"])
    assert token not in file.path.read_text()
    assert token.removeprefix("cmt_") not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [key.name for key in file.read()] == ["desk"]
    found = Keyring(file.path).find(token)
    assert found is not None
    assert found.scopes == {"query", "enroll"}
    with pytest.raises(KeyFileError, match="cmt keys list"):
        file.revoke("nothing")
    with pytest.raises(KeyFileError, match="0/second"):
        file.create("nobody", ["query"], "0/second")


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    makers = [
        threading.Thread(target=lambda n=n: file.create(str(n), ["query"])) for n in range(12)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert {key.name for key in file.read()} == {str(n) for n in range(12)}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_beyond_loopback_needs_a_key(tmp_path: Path, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(SettingsError, match="cmt keys create"):
        load_settings(checkpoint=tmp_path / "c", data_dir=tmp_path, host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(tmp_path: Path, host: str) -> None:
    assert load_settings(checkpoint=tmp_path / "c", data_dir=tmp_path, host=host).host == host


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    given = {"checkpoint": tmp_path / "c", "data_dir": tmp_path, "api_keys_file": file.path}
    with pytest.raises(SettingsError, match="no file of keys"):
        load_settings(**given)
    key, _ = file.create("one", ["query"])
    assert load_settings(**given, host="0.0.0.0").host == "0.0.0.0"
    file.revoke(key.id)
    with pytest.raises(SettingsError, match="nobody could get in"):
        load_settings(**given)
    file.path.write_text("not json")
    with pytest.raises(SettingsError, match="restore it"):
        load_settings(**given)


def test_other_sites_may_not_use_a_service_without_keys(http: httpx.Client) -> None:
    port = http.base_url.port
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://[::1"},
        {"Origin": f"http://127.0.0.1:{port}@evil.example"},
        {"Origin": f"http://127.0.0.1:{port}0"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
    ):
        answer = http.get("/gallery", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused")
    for headers in (
        {"Origin": f"http://127.0.0.1:{port}"},
        {"Host": f"localhost:{port}"},
        {"Host": f"[::1]:{port}"},
    ):
        assert http.get("/gallery", headers=headers).status_code == 200


def test_a_request_of_another_sites_page_is_refused_without_an_origin(
    http: httpx.Client, guarded: Guarded
) -> None:
    _, token = guarded.file.create("of a proxy that adds it", SCOPES)
    key = {"Authorization": f"Bearer {token}"}
    link = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    picture = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    for client, headers in ((http, {}), (guarded.http, key)):
        for site in ("cross-site", "same-site", "Cross-Site", "else"):
            other = {**headers, "Sec-Fetch-Site": site}
            for method, path, mode in (
                ("GET", "/gallery", picture),
                ("GET", f"/gallery/{NOBODY}/image", picture),
                ("GET", "/gallery", {**link, "Sec-Fetch-Dest": "iframe"}),
                ("POST", "/query", link),  # a form
                ("POST", "/gallery", {}),
                ("POST", "/admin/backup", {}),
                ("DELETE", "/gallery?person_id=x", {}),
            ):
                answer = client.request(method, path, headers={**other, **mode})
                assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused")
                assert "crossorigin" in answer.json()["detail"]
            for path in ("/docs", "/docs/docs.js", "/gallery", "/livez"):
                assert client.get(path, headers={**other, **link}).status_code == 200
        for site in ("same-origin", "none"):
            assert client.get("/gallery", headers={**headers, "Sec-Fetch-Site": site}).is_success


def test_answers_are_for_pages_of_this_origin_only(http: httpx.Client) -> None:
    for path in ("/gallery", "/docs", "/docs/docs.js", "/livez", "/nowhere"):
        assert http.get(path).headers["cross-origin-resource-policy"] == "same-origin"


def refused(http: httpx.Client, **headers: str) -> list[dict[str, Any]]:
    """The entries of refused callers, oldest first."""
    entries = http.get("/admin/audit?limit=1000", headers=headers).json()["entries"]
    return [entry for entry in reversed(entries) if entry["action"] == "refused"]


def test_refused_callers_are_in_the_audit_log(serve: Serve, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    admin = {"Authorization": f"Bearer {file.create('boss', ['admin'])[1]}"}
    desk, token = file.create("desk", ["query"])
    wrong = "cmt_" + "w" * 43
    with (
        serve(tmp_path / "data", api_keys_file=file.path, trusted_proxies=("127.0.0.1",)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        for _ in range(3):
            http.get("/gallery", headers={"Authorization": f"Bearer {wrong}"})
        http.post("/query", headers={"X-Forwarded-For": "203.0.113.7"})
        http.delete(f"/gallery/{NOBODY}", headers={"Authorization": f"Bearer {token}"})
        http.get("/gallery", headers={**admin, "Sec-Fetch-Site": "cross-site"})
        entries = refused(http, **admin)
        assert [(entry["actor"], entry["subject"], entry["details"]) for entry in entries] == [
            (actor, None, details)
            for actor, details in (
                ("address:127.0.0.1",
                 {"code": "unauthorized", "count": 1, "route": "GET /gallery"}),
                ("address:203.0.113.7",
                 {"code": "unauthorized", "count": 1, "route": "POST /query"}),
                (f"key:{desk.id}",
                 {"code": "scope_missing", "count": 1, "route": "DELETE /gallery/{id}"}),
                ("address:127.0.0.1",
                 {"code": "origin_refused", "count": 1, "route": "GET /gallery"}),
                ("address:127.0.0.1", {"code": "unauthorized", "count": 2}),
            )
        ]  # fmt: skip
        # However many addresses there are: IPv6 by networks, and beyond some all in one entry.
        for number in range(200):
            http.get("/gallery", headers={"X-Forwarded-For": f"2001:db8:0:1::{number:x}"})
            http.get("/gallery", headers={"X-Forwarded-For": f"198.51.100.{number}"})
        new = refused(http, **admin)[len(entries) :]
        assert len(new) < 40
        assert sum(entry["details"]["count"] for entry in new) == 400
        assert ("address:2001:db8:0:1::/64", 199) in [
            (entry["actor"], entry["details"]["count"]) for entry in new
        ]
        assert new[-1]["actor"] == "address:others"
    for path in (tmp_path / "data").rglob("*"):
        assert not path.is_file() or wrong.encode() not in path.read_bytes()


def test_refusals_of_the_last_minute_are_written_at_the_end(serve: Serve, tmp_path: Path) -> None:
    origin = {"Origin": "https://evil.example"}
    with serve(tmp_path) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        for _ in range(5):
            assert http.get("/gallery", headers=origin).status_code == 403
    with serve(tmp_path) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        assert [entry["details"]["count"] for entry in refused(http)] == [1, 4]


def test_an_origin_that_is_allowed_gets_in(serve: Serve, tmp_path: Path) -> None:
    origin = {"Origin": "https://desk.example"}
    with (
        serve(tmp_path, cors_origins=("https://desk.example",)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        for site in ({}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
            answer = http.get("/gallery", headers={**origin, **site})
            assert answer.headers["access-control-allow-origin"] == "https://desk.example"
            assert answer.status_code == 200
        # A picture, by <img crossorigin>: there is none of this id.
        other = {**origin, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}
        assert http.get(f"/gallery/{NOBODY}/image", headers=other).status_code == 404
        assert http.get("/gallery", headers={"Origin": "https://x.example"}).status_code == 403


def test_a_refused_preflight_is_a_problem(serve: Serve, tmp_path: Path) -> None:
    asked = {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}
    with (
        serve(tmp_path, cors_origins=("https://desk.example",)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        refused = http.options("/query", headers=asked)
        assert refused.status_code == 403
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == "origin_refused"
        assert "cors_origins" in refused.json()["detail"]
        allowed = http.options("/query", headers={**asked, "Origin": "https://desk.example"})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://desk.example"
