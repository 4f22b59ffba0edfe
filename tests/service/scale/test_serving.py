"""`cmt serve --engine ray --shards 2` with the embedded defaults: one command, one folder."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from service.errors import GalleryLocked
from service.gallery.storage.folder_lock import FolderLock
from tests.service.processes import ServiceProcess, assert_no_defect, gauge, wait_for


def sessions() -> set[Path]:
    """Folders of the Ray clusters that services have started for themselves."""
    return set(Path(tempfile.gettempdir()).glob("cmt-ray-*"))


def processes_of(session: Path) -> list[str]:
    """Command lines that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(file.read_bytes().decode(errors="replace"))
    return [line for line in found if str(session) in line]


def listening() -> set[str]:
    """Sockets that listen on other addresses than the loopback one."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            loopback = local.startswith(("0100007F", "00000000000000000000000001000000"))
            mapped = local.startswith("0000000000000000FFFF00000100007F")
            if state == "0A" and not (loopback or mapped):
                found.add(local)
    return found


def test_one_command_serves_a_gallery_in_shards(
    tmp_path: Path, tiny_checkpoint: Path, visible: list[Path], infrared: list[Path]
) -> None:
    killed = Path(tempfile.mkdtemp(prefix="cmt-ray-999999999-"))  # no process has this number
    (killed / "answers").write_bytes(b"of a service that was killed")
    before, others = listening(), sessions() - {killed}
    service = ServiceProcess(tmp_path / "data", tiny_checkpoint, engine="ray", shards=2)
    with service, service.client() as http:
        ids = []
        for crop in [*visible, *infrared]:
            files, data = {"image": crop.read_bytes()}, {"person_id": crop.parent.name}
            answer = http.post("/gallery", files=files, data=data)
            assert answer.status_code == 201
            ids.append(answer.json()["id"])
        files = {"image": visible[0].read_bytes()}
        asked = {"modulation": "false", "rerank": "none", "gallery_modality": "rgb"}
        answer = http.post("/query", files=files, data=asked).json()
        assert answer["results"][0]["item"]["id"] == ids[0]
        assert (answer["shards_ok"], answer["shards_total"]) == (2, 2)
        assert answer["searched"] == len(visible)
        assert http.get("/readyz").status_code == 200
        assert (gauge(http, "cmt_shards"), gauge(http, "cmt_shards_ok")) == (2, 2)
        with pytest.raises(GalleryLocked):
            FolderLock(tmp_path / "data")
        assert listening() <= before
        (session,) = sessions() - others  # and those of living processes stay
        assert not killed.exists()
        assert len(processes_of(session)) > 2
        assert_no_defect(service)
    assert service.process.returncode == 0
    assert not session.exists()
    wait_for(lambda: not processes_of(session), "processes of Ray go on")
