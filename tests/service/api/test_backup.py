"""Backups over HTTP and by `cmt`, of a service that works meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import httpx
import pytest

from model import load_checkpoint
from model.cli import main
from service.api import backup as download
from service.auth.keys import KeyFile
from service.client import AsyncClient, Client, ServiceProblem, Unreachable
from service.gallery import NewItem
from service.gallery.backup.archive import peek
from service.gallery.backup.restore import restore
from service.gallery.storage.store import Store
from tests.service.conftest import Serve
from tests.service.gallery.storage.test_disk_full import Disk, disk  # noqa: F401 - fixture
from tests.service.processes import wait_for
from tests.service.stores import crop, rows

BIG = 24  # crops of 1 MB: more than sockets hold, unless their buffers may grow to it


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CMT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def big(serve: Serve, tiny_checkpoint: Path, tmp_path_factory: Any) -> Iterator[tuple[str, Path]]:
    """A service with large crops → its URL and data folder."""
    folder = tmp_path_factory.mktemp("big")
    _, info = load_checkpoint(tiny_checkpoint)
    size = info.config.embedding_size
    with closing(Store(folder, info.fingerprint, size)) as store:
        for seed in range(BIG):
            data = random.Random(seed).randbytes(1_000_000)
            store.add([NewItem(replace(crop(seed), data=data))], rows(1, seed, size))
    with serve(folder) as url:
        yield url, folder


def temporary(folder: Path) -> list[Path]:
    return list(folder.glob(".cmt-copy-*"))


def open_copies() -> list[str]:
    """Files of this process, which the service shares, that are deleted and still open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except OSError:
            continue
    return [name for name in found if ".cmt-copy-" in name]


def wait_until_free() -> None:
    wait_for(lambda: not open_copies(), "a copy stays open")


@contextmanager
def old_proxy(url: str, *, cut: int | None = None, lengths: bool = True) -> Iterator[str]:
    """A proxy that speaks HTTP/1.0 to a service → its URL.

    cut: bytes of an answer's body after which it ends. lengths: whether it says how long they are.
    """
    address = httpx.URL(url)

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            asked = [self.rfile.readline().replace(b"HTTP/1.1", b"HTTP/1.0")]
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if not line.lower().startswith(b"connection:"):
                    asked.append(line)
            with socket.create_connection((address.host, address.port or 0)) as service:
                service.sendall(b"".join([*asked, b"\r\n"]))
                answer = service.makefile("rb")
                while (line := answer.readline()) not in (b"\r\n", b""):
                    if lengths or not line.lower().startswith(b"content-length:"):
                        self.wfile.write(line)
                self.wfile.write(b"\r\n")
                left = cut
                while left != 0 and (data := answer.read1(left or 65_536)):
                    left = None if left is None else left - len(data)
                    self.wfile.write(data)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:  # or a test that fails would never end
            server.shutdown()
            thread.join()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_what_a_client_downloads_can_be_served(
    serve: Serve, visible: list[Path], infrared: list[Path], tmp_path: Path
) -> None:
    def answers(client: Client) -> list[Any]:
        found: list[Any] = [client.list()]
        for image in infrared[:3]:
            answer = client.query(image, top_k=3, explain=True)
            found.append(answer.model_copy(update={"timings_ms": None}))
        return found

    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    with serve(tmp_path / "data") as url, Client(url) as client:
        for file in visible:
            client.enroll(file, person_id=file.parent.name, idempotency_key=file.parent.name)
        expected = answers(client)
        client.backup(first)
        client.backup(first)  # takes its place

        async def again() -> None:
            async with AsyncClient(url) as other:
                await other.backup(second)

        asyncio.run(again())
        assert not temporary(tmp_path / "data")
        assert not open_copies()
    assert stat.S_IMODE(first.stat().st_mode) == stat.S_IMODE(second.stat().st_mode) == 0o600
    assert peek(first).counts["items"] == peek(second).counts["items"] == len(visible)
    restore(second, tmp_path / "restored")
    with serve(tmp_path / "restored") as url, Client(url) as client:
        assert answers(client) == expected
        again_enrolled = client.enroll(
            visible[0], person_id=visible[0].parent.name, idempotency_key=visible[0].parent.name
        )
        assert again_enrolled == expected[0].items[0]
        actions = [entry.action for entry in client.audit().entries]
        assert actions.count("backup") == 3
        assert "restore" in actions
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data", "first.zip", "restored", "second.zip",
    ]  # fmt: skip


def test_the_answer_is_a_private_attachment(http: httpx.Client) -> None:
    answer = http.post("/admin/backup")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    name = r'attachment; filename="cmt-backup-\d{8}T\d{6}Z\.zip"'
    assert re.fullmatch(name, answer.headers["content-disposition"])
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.content.startswith(b"PK\x03\x04")
    assert http.post("/admin/backup?folder=/tmp").status_code == 422
    operation = http.get("/openapi.json").json()["paths"]["/admin/backup"]["post"]
    assert operation["responses"]["200"]["content"].keys() == {"application/zip"}
    assert "backup_running" in operation["responses"]["409"]["description"]
    assert "storage_full" in operation["responses"]["507"]["description"]


def test_only_an_admin_may(serve: Serve, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    tokens = {scope: keys.create(scope, [scope])[1] for scope in ("query", "enroll", "admin")}
    with serve(tmp_path / "data", api_keys_file=keys.path) as url:
        for scope in (None, "query", "enroll"):
            token = None if scope is None else tokens[scope]
            with Client(url, api_key=token) as client, pytest.raises(ServiceProblem) as refused:
                client.backup(tmp_path / "no.zip")
            assert refused.value.code == ("unauthorized" if scope is None else "scope_missing")
        assert not (tmp_path / "no.zip").exists()
        with Client(url, api_key=tokens["admin"]) as client:
            client.backup(tmp_path / "yes.zip")
            (newest,) = [e for e in client.audit().entries if e.action == "backup"]
    admin = next(key for key in keys.read() if key.name == "admin")
    assert newest.actor == f"key:{admin.id}"


def test_one_at_a_time_and_the_service_works_meanwhile(
    big: tuple[str, Path], visible: list[Path], tmp_path: Path
) -> None:
    url, folder = big
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        Client(url) as client,
        http.stream("POST", "/admin/backup") as slow,
    ):
        blocks = slow.iter_bytes(1000)
        assert next(blocks).startswith(b"PK")
        with pytest.raises(ServiceProblem) as refused:
            client.backup(tmp_path / "second.zip")
        assert (refused.value.status, refused.value.code) == (409, "backup_running")
        assert not list(tmp_path.iterdir())
        item = client.enroll(visible[0])
        assert client.query(visible[0], top_k=1).results[0].item == item
        client.delete(item.id)
        assert sum(map(len, blocks)) > 1_000_000 * BIG
    wait_until_free()
    with Client(url) as client:
        client.backup(tmp_path / "second.zip")
    assert not temporary(folder)


def test_a_client_that_vanishes_leaves_nothing(big: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = big
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        http.stream("POST", "/admin/backup") as response,
    ):
        next(response.iter_bytes(1000))
        # None where all of it fits into the buffers of the connection, and is done with.
        assert len(open_copies()) <= 1
        assert not temporary(folder)
    wait_until_free()
    # One that is gone before the answer begins.
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as raw:
        raw.sendall(b"POST /admin/backup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")

    def backed_up() -> bool:
        with Client(url) as client:
            try:
                client.backup(tmp_path / "whole.zip")
            except ServiceProblem as problem:
                if problem.code != "backup_running":
                    raise
                return False
        return True

    wait_for(backed_up, "the backup of who is gone does not end")
    wait_until_free()
    assert peek(tmp_path / "whole.zip").counts["items"] == BIG
    assert not temporary(folder)


def test_a_client_that_reads_slowly_gets_every_byte_once(
    big: tuple[str, Path], tmp_path: Path
) -> None:
    """The server's buffers are full again and again, at any moment of its writing."""
    url, _ = big
    wait_until_free()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        raw.connect(("127.0.0.1", httpx.URL(url).port or 0))
        raw.sendall(b"POST /admin/backup HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        raw.sendall(b"Content-Length: 0\r\n\r\n")
        received = bytearray()
        while block := raw.recv(200_000):
            received += block
            if len(received) < 3_000_000:
                time.sleep(0.001)
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}" in head.decode().lower().split("\r\n")
    file = tmp_path / "slow.zip"
    file.write_bytes(body)
    assert peek(file).counts["items"] == BIG
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def test_a_client_that_does_not_read_is_given_up(
    big: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = big
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=60))
        with monkeypatch.context() as impatience:
            impatience.setattr(download, "_PATIENCE", 0.5)
            response = stack.enter_context(http.stream("POST", "/admin/backup"))
            blocks = response.iter_bytes(1000)
            next(blocks)
            wait_until_free()
        with Client(url) as client:
            client.backup(tmp_path / "whole.zip")
        with pytest.raises(httpx.RemoteProtocolError):
            list(blocks)
    assert not temporary(folder)


def test_a_full_disk_is_507_and_queries_go_on(
    serve: Serve, visible: list[Path], disk: Disk, tmp_path_factory: pytest.TempPathFactory  # noqa: F811
) -> None:  # fmt: skip
    file = tmp_path_factory.mktemp("elsewhere") / "backup.zip"
    with serve(disk.data) as url, Client(url) as client:
        item = client.enroll(visible[0])
        disk.fill()
        with pytest.raises(ServiceProblem, match="free some") as full:
            client.backup(file)
        assert (full.value.status, full.value.code) == (507, "storage_full")
        assert not temporary(disk.data)
        assert not list(file.parent.iterdir())
        assert client.query(visible[0], top_k=1).results[0].item == item
        disk.free()
        client.backup(file)
    assert peek(file).counts["items"] == 1


def test_a_download_that_ends_early_leaves_no_file(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nPK\x03\x04x\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            await writer.drain()
            writer.close()

        async def scenario() -> None:
            async with await asyncio.start_server(answer, sock=server):
                async with AsyncClient(url) as client:
                    with pytest.raises(Unreachable, match="in the middle"):
                        await client.backup(tmp_path / "x.zip")
                with Client(url) as client, pytest.raises(Unreachable, match="in the middle"):
                    await asyncio.to_thread(client.backup, tmp_path / "x.zip")

        asyncio.run(scenario())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "no lengths"])
def test_a_backup_that_a_proxy_cuts_off_replaces_nothing(
    lengths: bool, big: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = big
    new, old = tmp_path / "new.zip", tmp_path / "old.zip"
    wait_until_free()
    with old_proxy(url, lengths=lengths) as through:
        assert run(capsys, "backup", old, "--url", through)[0] == 0
    wait_until_free()  # the proxy has all of it before the service has ended it
    before = old.read_bytes()
    # In the first block, in the middle of a crop, and just before the end.
    for cut in (1000, len(before) // 2, len(before) - 1):
        with old_proxy(url, cut=cut, lengths=lengths) as through:
            for file, option in ((new, ()), (old, ("--force",))):
                status, _, err = run(capsys, "backup", file, "--url", through, *option)
                assert status == 1
                assert "in the middle" in err
                assert len(err.splitlines()) == 1
                wait_until_free()

            async def asynchronously(url: str) -> None:
                async with AsyncClient(url) as client:
                    with pytest.raises(Unreachable, match="in the middle"):
                        await client.backup(new)

            asyncio.run(asynchronously(through))
            wait_until_free()
        assert [path.name for path in tmp_path.iterdir()] == ["old.zip"]
        assert old.read_bytes() == before


def test_every_answer_to_http_1_0_says_its_length(
    serve: Serve, visible: list[Path], tmp_path: Path
) -> None:
    with serve(tmp_path) as url, Client(url) as client:
        item = client.enroll(visible[0])
        paths = ["/livez", "/readyz", "/metrics", "/model", "/openapi.json", "/docs"]
        paths += ["/docs/docs.js", "/gallery", f"/gallery/{item.id}", f"/gallery/{item.id}/image"]
        paths += ["/cameras", "/admin/audit", "/admin/versions", "/admin/reembed", "/nowhere"]
        with old_proxy(url) as through:
            for path in paths:
                answer = httpx.get(through + path, trust_env=False, timeout=60)
                assert answer.headers["content-length"] == str(len(answer.content)), path
            answer = httpx.post(f"{through}/admin/backup", trust_env=False, timeout=60)
            assert answer.headers["content-length"] == str(len(answer.content))
        # A crop has no end of its own that could be looked at.
        with (
            old_proxy(url, lengths=False) as through,
            Client(through) as other,
            pytest.raises(Unreachable, match=r"speak HTTP/1\.1"),
        ):
            other.image(item.id)


def test_cmt_backup_and_restore(
    serve: Serve, visible: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    online, offline, data = tmp_path / "on.zip", tmp_path / "off.zip", tmp_path / "data"
    with serve(data) as url:
        with Client(url) as client:
            items = [client.enroll(file) for file in visible[:3]]
        status, out, _ = run(capsys, "backup", online, "--url", url)
        assert status == 0
        assert f"Wrote {online}: 3 items, " in out
        status, _, err = run(capsys, "backup", offline, "--data-dir", data)
        assert status == 1
        assert "is in use by another process" in err
        status, _, err = run(capsys, "backup", online, "--url", url)
        assert status == 2
        assert "--force" in err
        assert len(err.splitlines()) == 1
        assert run(capsys, "backup", online, "--url", url, "--force")[0] == 0
        status, _, err = run(capsys, "restore", online, "--data-dir", data)
        assert status == 1
        assert "is in use by another process" in err
    status, out, err = run(capsys, "backup", offline, "--data-dir", data)
    assert status == 0, err
    assert stat.S_IMODE(offline.stat().st_mode) == stat.S_IMODE(online.stat().st_mode) == 0o600
    status, _, err = run(capsys, "backup", tmp_path / "no.zip", "--data-dir", tmp_path / "typo")
    assert status == 1
    assert "there is no gallery at" in err
    assert not (tmp_path / "typo").exists()
    assert run(capsys, "backup", tmp_path / "no.zip", "--temp-dir", tmp_path)[0] == 2
    status, _, err = run(capsys, "restore", offline, "--data-dir", data)
    assert status == 1
    assert "give a new data folder" in err
    assert len(err.splitlines()) == 1
    for number, file in enumerate((online, offline)):
        fresh = tmp_path / f"fresh-{number}"
        status, out, _ = run(capsys, "restore", file, "--data-dir", fresh)
        assert status == 0
        assert "Restored 3 items of 20" in out
        with serve(fresh) as url, Client(url) as client:
            assert client.list().items == items
    status, _, err = run(capsys, "restore", visible[0], "--data-dir", tmp_path / "other")
    assert status == 1
    assert "is no backup" in err


def test_cmt_restores_into_another_database(
    serve: Serve, visible: list[Path], tmp_path: Path, postgres_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, back = tmp_path / "sqlite.zip", tmp_path / "postgresql.zip"
    with serve(tmp_path / "data") as url:
        with Client(url) as client:
            items = [client.enroll(image) for image in visible[:3]]
        assert run(capsys, "backup", file, "--url", url)[0] == 0
    there = ("--data-dir", tmp_path / "shared", "--database-url", postgres_url)
    status, _, err = run(capsys, "restore", file, *there)
    assert status == 0, err
    with serve(tmp_path / "shared", database_url=postgres_url) as url, Client(url) as client:
        assert client.list().items == items
        assert client.query(visible[1], top_k=1).results[0].item == items[1]
    assert run(capsys, "backup", back, *there)[0] == 0
    assert run(capsys, "restore", back, "--data-dir", tmp_path / "back")[0] == 0
    with serve(tmp_path / "back") as url, Client(url) as client:
        assert client.list().items == items


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"Example: cmt {command}" in " ".join(out.split())
