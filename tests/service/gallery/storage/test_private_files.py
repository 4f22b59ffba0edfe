"""The data folder is its owner's alone; a file system that cannot lock is called so."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from service.errors import GalleryLocked, StorageUnwritable
from service.gallery import Filters, Gallery, NewItem
from service.gallery.backup.restore import restore
from service.gallery.storage.folder_lock import FolderLock
from tests.service.places import INFO, features
from tests.service.processes import ServiceProcess
from tests.service.stores import crop


def modes(folder: Path) -> dict[str, int]:
    """Everything in a folder that is no link, by its path in there → its mode."""
    paths = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in paths}


def assert_private(folder: Path, *names: str) -> None:
    found = modes(folder)
    assert set(names) <= found.keys()
    for name, mode in found.items():
        assert mode == (0o700 if (folder / name).is_dir() else 0o600), (name, oct(mode))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_whatever_the_umask_all_is_private(tmp_path: Path, mask: int) -> None:
    folder, backup = tmp_path / "data", tmp_path / "gallery.zip"
    elsewhere = tmp_path / "rows"
    elsewhere.mkdir()
    with umask(mask):
        url = f"sqlite:///{elsewhere / 'other.sqlite3'}"
        for address in (None, url):
            gallery = Gallery.open(folder, INFO, database_url=address)
            gallery.add([NewItem(crop(i)) for i in range(60)], features(60, 1))
            assert gallery.save_index()
            assert_private(folder, "lock", "gallery.sqlite3", "audit.key", "index/MANIFEST")
            if address is None:
                assert {"gallery.sqlite3-wal", "gallery.sqlite3-shm"} <= modes(folder).keys()
                gallery.backup(backup)
            gallery.close()
    found = modes(elsewhere)
    assert {name for name, mode in found.items() if mode == 0o600} == {"lock", "other.sqlite3"}
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    (tmp_path / "restored").mkdir()
    (tmp_path / "restored").chmod(0o755)
    with umask(mask):
        restore(backup, tmp_path / "restored")
    assert_private(tmp_path / "restored", "gallery.sqlite3", "audit.key")


def test_an_existing_folder_is_tightened_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    gallery = Gallery.open(folder, INFO)
    gallery.add([NewItem(crop(i)) for i in range(60)], features(60, 1))
    gallery.save_index()
    gallery.close()
    (folder / "notes").mkdir()
    (folder / "notes" / "today.txt").write_text("unknown to the gallery")
    (folder / "tool").write_text("#!/bin/sh\n")
    outside = tmp_path / "outside"
    outside.write_text("linked")
    (folder / "link").symlink_to(outside)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        Gallery.open(folder, INFO).close()
    assert any("now only their owner may use them" in message for message in caplog.messages)
    found = modes(folder)
    assert (found.pop("tool"), found.pop("notes/today.txt")) == (0o700, 0o700)  # programs stay so
    for name, mode in found.items():
        assert mode == (0o700 if (folder / name).is_dir() else 0o600), (name, oct(mode))
    assert (folder / "notes" / "today.txt").read_text() == "unknown to the gallery"
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Gallery.open(folder, INFO).close()
    assert caplog.messages == []


def test_a_mode_without_effect_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CIFS, which takes a mode without an error, and shows what it was mounted with."""
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        gallery = Gallery.open(folder, INFO)
    assert any("keeps no modes" in message for message in caplog.messages)
    (item,) = gallery.add([NewItem(crop())], features(1, 1))
    assert gallery.list(Filters(), 1).items == [item]
    gallery.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_folder_that_belongs_to_somebody_else_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a volume in Kubernetes, which the service's user may write to by its group."""
    folder = Path(tempfile.mkdtemp(prefix="cmt-test-"))  # others cannot enter tmp_path
    folder.chmod(0o777)
    nobody = 65534
    try:
        os.seteuid(nobody)
        try:
            with caplog.at_level(logging.WARNING):
                gallery = Gallery.open(folder, INFO)
            (item,) = gallery.add([NewItem(crop())], features(1, 1))
            assert gallery.list(Filters(), 1).items == [item]
            gallery.close()
        finally:
            os.seteuid(0)
        [warning] = caplog.messages
        assert "others may use 1 file or folder of" in warning
        assert "Operation not permitted" in warning
        database = (folder / "gallery.sqlite3").stat()
        assert (database.st_uid, stat.S_IMODE(database.st_mode)) == (nobody, 0o600)
    finally:
        shutil.rmtree(folder)


def test_what_everybody_shares_keeps_its_mode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "others").write_text("of somebody else")
    (shared / "others").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Gallery.open(shared, INFO).close()
    assert any("data folder of its own" in message for message in caplog.messages)
    found = modes(shared)
    assert (found["."], found["others"]) == (0o1777, 0o644)
    assert (found["gallery.sqlite3"], found["audit.key"]) == (0o600, 0o600)


def test_a_service_keeps_even_its_caches_private(tiny_checkpoint: Path, tmp_path: Path) -> None:
    runtime = "openvino" if find_spec("openvino") else "torch"
    folder = tmp_path / "data"
    with umask(0), ServiceProcess(folder, tiny_checkpoint, runtime=runtime) as service:
        assert_private(folder, "lock", "gallery.sqlite3", "audit.key")
        assert (folder / "cache").is_dir() == (runtime == "openvino")
    assert_private(folder)
    assert "open to others" not in service.text()


# --- locks ---


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOLCK, "cannot lock files .ENOLCK: .* local disk"),
        (errno.EOPNOTSUPP, "cannot lock files .* local disk"),
        (errno.ENOSYS, "cannot lock files .ENOSYS"),
        (errno.EIO, "reports an error when a file is locked .EIO: .*check the disk"),
    ],
)
@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_file_system_without_locks_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, call, fail)
        with pytest.raises(StorageUnwritable, match=sentence):
            FolderLock(tmp_path)
    lock = FolderLock(tmp_path)  # the failed one holds nothing
    with pytest.raises(GalleryLocked, match="in use by another process"):
        FolderLock(tmp_path)
    lock.release()
