"""A file gets its name when it is complete, and only from who wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.atomic_file import whole_file


def test_what_is_written_can_be_checked_before_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(part: bytes) -> None:
        with whole_file(path) as file:
            file.write(part)
            file.seek(0)
            if file.read() != b"new":
                raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        write(b"ne")
    assert path.read_bytes() == b"old"
    write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write_both(*, fail: bool) -> None:
        with whole_file(path) as first:
            first.write(b"first")
            with whole_file(path) as second:
                second.write(b"second")
                if fail:
                    raise ValueError("given up")

    with pytest.raises(FileExistsError, match="another process writes to it"):
        write_both(fail=False)
    assert path.read_bytes() == b"second"
    with pytest.raises(ValueError, match="given up"):
        write_both(fail=True)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]
