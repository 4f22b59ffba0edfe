"""Folders as people have them: what counts as an image, and what is named instead of opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from model.image_files import ImageFiles, find_images, read_file, why_unusable


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content")
    return path


def reasons(found: ImageFiles, root: Path) -> dict[str, tuple[str, bool]]:
    return {str(one.path.relative_to(root)): (one.reason, one.lost) for one in found.skipped}


def test_what_other_programs_leave_is_left_alone(tmp_path: Path) -> None:
    wanted = [put(tmp_path / "bob" / "2.Jpeg"), put(tmp_path / "bob" / "sub" / "3.TIFF")]
    for other in ("@eaDir/2.jpg/thumb.jpg", ".cache/2.jpg", "__MACOSX/2.jpg", "#recycle/2.png",
                  "Lost+Found/2.webp", "bob/._2.Jpeg"):  # fmt: skip
        put(tmp_path / other)
    put(tmp_path / "Thumbs.db")
    put(tmp_path / "notes.txt")
    found = find_images(tmp_path)
    assert found.images == wanted
    assert set(reasons(found, tmp_path).values()) == {("made by another program", False)}
    assert len(found.skipped) == 6
    # A folder that is asked for by name is read, whatever it is called.
    assert find_images(tmp_path / ".cache").images == [tmp_path / ".cache" / "2.jpg"]


def test_folders_are_entered_whatever_they_are_called_and_never_read_as_files(
    tmp_path: Path,
) -> None:
    inside = put(tmp_path / "holiday.jpg" / "1.png")
    flat = put(tmp_path / "0.png")
    assert find_images(tmp_path).images == [flat, inside]
    found = find_images(tmp_path, below=False)
    assert found.images == [flat]
    assert reasons(found, tmp_path) == {"holiday.jpg": ("is a folder, not a file", True)}


def test_a_linked_folder_is_read_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    own = put(root / "z" / "1.jpg")
    outside = put(tmp_path / "other disk" / "2.jpg")
    (root / "a").symlink_to(root / "z")
    (root / "cam9").symlink_to(outside.parent)
    (outside.parent / "back").symlink_to(root)  # a loop
    (root / "one.jpg").symlink_to(own)
    found = find_images(root)
    assert found.images == [root / "cam9" / "2.jpg", root / "one.jpg", own]
    read = "leads to a folder read already"
    assert reasons(found, root) == {"a": (read, False), "cam9/back": (read, False)}


def test_what_cannot_be_read_is_named_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "live.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "album").symlink_to(tmp_path / "not mounted")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    (tmp_path / "null.bmp").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        found = find_images([tmp_path, tmp_path / "missing"])
    assert found.images == []
    assert reasons(found, tmp_path) == {
        "album": ("is a link to nothing", True),
        "gone.jpg": ("is a link to nothing", True),
        "live.jpg": ("is a pipe, not a file", True),
        "missing": ("No such file or directory", True),
        "null.bmp": ("is a device, not a file", True),
        "round.png": ("is a link to nothing", True),
        "s.png": ("is a socket, not a file", True),
    }
    with pytest.raises(OSError, match="is a pipe, not a file"):
        read_file(tmp_path / "live.jpg")
    assert why_unusable(put(tmp_path / "1.jpg")) is None
    assert read_file(tmp_path / "1.jpg") == b"content"


def test_names_that_are_no_text_are_names(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    put(file)
    assert find_images(tmp_path).images == [file]
    assert read_file(file) == b"content"
