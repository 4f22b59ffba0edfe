"""CSV files of spreadsheets, scripts and people."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from model.csv_table import read_table

KNOWN = ("file", "person_id", "note")


def read(path: Path, data: bytes) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    path.write_bytes(data)
    table = read_table(path, ("file",), KNOWN)
    return table.rows, table.problems


@pytest.mark.parametrize(
    "data",
    [
        b"file,person_id,note\na.jpg,bob,x\n",
        codecs.BOM_UTF8 + b"file;person_id;note\r\na.jpg;bob;x\r\n",
        b"File\tPERSON_ID\t note \na.jpg\tbob\tx",
        b' "file", person_id , note\na.jpg, bob, "x"\n',
        b"file,person_id,note,,\na.jpg,bob,x,,\n",
        b"note;file;person_id\rx;a.jpg;bob\r",
    ],
)
def test_every_spelling_of_a_table(tmp_path: Path, data: bytes) -> None:
    rows, problems = read(tmp_path / "t.csv", data)
    assert not problems
    assert [line for line, _ in rows] == [2]
    cells = {name: cell for name, cell in rows[0][1].items() if name}
    assert cells == {"file": "a.jpg", "person_id": "bob", "note": "x"}


def test_one_column_and_cells_with_delimiters(tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv", b"file\na;b.jpg\n") == ([(2, {"file": "a;b.jpg"})], [])
    rows, problems = read(
        tmp_path / "t.csv", b'file;note\n\n"a;1.jpg";"{""x"": [1, 2]}"\n;\n"b\nc.jpg";\nd.jpg;y\n'
    )
    assert not problems
    assert rows == [
        (3, {"file": "a;1.jpg", "note": '{"x": [1, 2]}'}),
        (5, {"file": "b\nc.jpg", "note": ""}),
        (7, {"file": "d.jpg", "note": "y"}),
    ]


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (b"", ["there is no column 'file'; it needs the columns"]),
        (b"a.jpg,bob\n", ["'a.jpg' is unknown", "'bob' is unknown", "no column 'file'"]),
        (b"file,person\n", ["the column 'person' is unknown; is it 'person_id'?"]),
        (b"file,note,NOTE\n", ["the column 'note' is there 2 times"]),
        (b"file,note\na.jpg\nb.jpg,x,y\nc.jpg,z\n", ["line 2 has 1 cells", "line 3 has 3 cells"]),
        (b"file,\na.jpg,x\n", ["line 2 has a cell in a column without a name"]),
        (b'file,note\na.jpg,"x\nb.jpg,y\n', ["line 2: unexpected end of data; a quote"]),
        (b'"file,note\na.jpg,x\n', ["there is no column 'file'"]),
        ("file\na.jpg\n".encode("utf-16"), ["UTF-16"]),
        ("file\na.jpg\n".encode("utf-16-le"), ["UTF-16"]),
        ("file\n\nZoë.jpg\n".encode("latin-1"), ["line 3 is no UTF-8"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, data: bytes, problems: list[str]
) -> None:
    _, told = read(tmp_path / "t.csv", data)
    assert len(told) == len(problems)
    for sentence, part in zip(told, problems, strict=True):
        assert part in sentence


def test_columns_may_be_any(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("role\tfile\nquery\ta.jpg\n")
    table = read_table(tmp_path / "t.csv", ("file", "role"))
    assert (table.rows, table.problems) == ([(2, {"role": "query", "file": "a.jpg"})], [])
