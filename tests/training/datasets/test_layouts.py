"""RegDB, LLCM and plain folders: both sides of their protocols, and what damage is called."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests.paths import MINI
from training.datasets import LAYOUTS, DatasetError, DatasetName, Layout, Sample, find_layout
from training.datasets.folder import person_number
from training.samples import training_samples

REGDB = LAYOUTS[DatasetName.REGDB]
LLCM = LAYOUTS[DatasetName.LLCM]
FOLDER = LAYOUTS[DatasetName.FOLDER]
SYSU = LAYOUTS[DatasetName.SYSU]


def people(samples: Iterable[Sample]) -> set[int]:
    return {sample.person_id for sample in samples}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda root: Path(shutil.copytree(root, tmp_path / "set"))


def test_every_layout_is_there_under_its_name() -> None:
    assert {name: layout.name for name, layout in LAYOUTS.items()} == {n: n for n in DatasetName}


def test_regdb_people_are_folders_and_not_labels(regdb_root: Path) -> None:
    train, test = REGDB.train(regdb_root, 1), REGDB.test(regdb_root, 1)
    assert people(train) == {2, 3, 4, 5}
    assert people(test) == {1, 6, 7, 8}
    for side in (train, test):
        assert Counter((s.modality, s.camera) for s in side) == {("rgb", 1): 12, ("ir", 2): 12}
        for sample in side:
            word = "Visible" if sample.modality == "rgb" else "Thermal"
            assert sample.path.parent == regdb_root / word / str(sample.person_id)
            assert sample.path.is_file()


def test_regdb_has_ten_trials_each_a_split_of_all_people(regdb_root: Path) -> None:
    sides = set()
    for trial in range(1, 11):
        train, test = people(REGDB.train(regdb_root, trial)), people(REGDB.test(regdb_root, trial))
        assert train | test == set(range(1, 9))
        assert not train & test
        sides.add(tuple(sorted(train)))
    assert len(sides) == 8
    for trial in (0, 11):
        with pytest.raises(DatasetError, match="splits 1 to 10"):
            REGDB.train(regdb_root, trial)
    with pytest.raises(DatasetError, match="one split only"):
        LLCM.test(regdb_root, 2)


def test_chosen_identities_come_from_either_side(regdb_root: Path) -> None:
    assert people(REGDB.train(regdb_root, 1, {1, 2, 99})) == {1, 2}
    assert people(REGDB.test(regdb_root, 1, [2, 3])) == {2, 3}
    with pytest.raises(DatasetError, match=r"Visible/99/, but identity 99 \(1 missing"):
        REGDB.test(regdb_root, 1, [2, 99])


def test_llcm_sides(llcm_root: Path) -> None:
    train, test = LLCM.train(llcm_root), LLCM.test(llcm_root)
    assert people(train) == {1, 2, 3, 4}
    assert people(test) == {5, 6, 7}
    assert Counter((s.modality, s.camera) for s in train) == {
        ("rgb", 1): 4,
        ("rgb", 2): 4,
        ("ir", 1): 4,
        ("ir", 2): 4,
    }
    counts = Counter((s.modality, s.camera) for s in test)
    assert counts == {("rgb", c): 6 for c in (1, 2, 3)} | {("ir", c): 6 for c in (1, 2)}


def test_folder_has_everyone_on_both_sides(folder_root: Path) -> None:
    everyone = {3, 12, person_number("ann"), person_number("bob")}
    assert people(FOLDER.train(folder_root)) == people(FOLDER.test(folder_root)) == everyone
    assert Counter(s.modality for s in FOLDER.train(folder_root)) == {"rgb": 8, "ir": 8}


def test_folder_names_are_numbers_that_others_do_not_change(
    folder_root: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert person_number("0012") == 12
    assert person_number("ann") != person_number("Ann") != person_number("bob")
    changed = copy(folder_root)
    shutil.rmtree(changed / "rgb" / "3")
    assert people(FOLDER.images(changed)) == people(FOLDER.images(folder_root))
    (tmp_path / "names.txt").write_text("ann, 12\nbob\n")
    names = FOLDER.read_ids(tmp_path / "names.txt")
    assert set(names) == {12, person_number("ann"), person_number("bob")}
    (tmp_path / "names.txt").write_text(" ,\n")
    with pytest.raises(DatasetError, match=r"names of people.*names\.txt"):
        FOLDER.read_ids(tmp_path / "names.txt")


def both_sides(layout: Layout, root: Path) -> tuple[list[Sample], list[Sample]]:
    return layout.train(root), layout.test(root)


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


def empty(*folders: str) -> Callable[[Path], object]:
    """Leave the folders, without what they hold."""

    def damage(root: Path) -> None:
        for name in folders:
            for entry in (root / name).iterdir():
                if entry.is_file():
                    entry.unlink()

    return damage


def remove(path: str) -> Callable[[Path], object]:
    return lambda root: (
        shutil.rmtree(root / path) if (root / path).is_dir() else ((root / path).unlink())
    )


@pytest.mark.parametrize(
    ("layout", "damage", "expected"),
    [
        (REGDB, remove("idx/train_thermal_1.txt"), r"idx/train_thermal_1\.txt"),
        (REGDB, remove("idx/test_visible_1.txt"), r"idx/test_visible_1\.txt"),
        (REGDB, remove("Thermal/5/shot_1_5.bmp"), r"Thermal/5/shot_1_5\.bmp \(1 missing"),
        (REGDB, write("idx/train_visible_1.txt", "Visible/2/shot_0_2.bmp\n"), "line 1 of"),
        (REGDB, write("idx/train_visible_1.txt", "\n"), "folder/person/image label"),
        (
            REGDB,
            write(
                "idx/train_visible_1.txt", "Visible/2/shot_0_2.bmp 0\nVisible/3/shot_0_3.bmp 0\n"
            ),
            "label 0 to the folders 2 and 3",
        ),
        (LLCM, remove("idx/train_nir.txt"), r"idx/train_nir\.txt"),
        (LLCM, remove("idx/test_id.txt"), r"idx/test_id\.txt"),
        (LLCM, remove("test_nir"), "test_nir of the LLCM layout"),
        (LLCM, write("idx/test_id.txt", "5,8"), r"test_vis/cam\*/0008/"),
        (FOLDER, remove("ir"), "/ir of the folder layout"),
        (FOLDER, empty("rgb/ann", "ir/ann"), r"/rgb/ann/, but identity \d+ \(1 missing"),
    ],
)
def test_errors_name_the_file_and_the_page(
    request: pytest.FixtureRequest,
    copy: Callable[[Path], Path],
    layout: Layout,
    damage: Callable[[Path], object],
    expected: str,
) -> None:
    root = copy(request.getfixturevalue(f"{layout.name.value}_root"))
    damage(root)
    with pytest.raises(DatasetError, match=expected) as caught:
        both_sides(layout, root)
    assert str(caught.value).endswith(f"see docs/training.md#{layout.name.value}.")
    assert str(root) in str(caught.value)


def test_sysu_errors_name_the_page_too(tmp_path: Path) -> None:
    for root, expected in ((tmp_path, "cam1"), (MINI, "test_id.txt")):
        with pytest.raises(DatasetError, match=expected) as caught:
            SYSU.test(root)
        assert "see docs/training.md#sysu" in str(caught.value)


def test_sysu_holds_validation_people_back_where_there_is_no_list_of_test_people(
    copy: Callable[[Path], Path],
) -> None:
    train, validation = {7, 18, 21, 23, 30}, {12, 218, 370}
    assert people(SYSU.train(MINI)) == train
    (note,) = SYSU.notes(MINI)
    assert "3 identities" in note
    assert "val_id.txt are held back" in note
    real = copy(MINI)
    (real / "exp" / "train_id.txt").write_text("7,18,21\n")
    (real / "exp" / "test_id.txt").write_text("23,30\n")
    assert people(SYSU.train(real)) == {7, 18, 21} | validation
    assert people(SYSU.test(real)) == {23, 30}
    assert SYSU.notes(real) == []


def test_sysu_never_trains_on_test_people_even_if_the_lists_share_them(
    copy: Callable[[Path], Path],
) -> None:
    root = copy(MINI)
    shutil.copy(root / "exp" / "val_id.txt", root / "exp" / "test_id.txt")
    assert people(SYSU.train(root)) == {7, 18, 21, 23, 30}
    assert people(SYSU.test(root)) == {12, 218, 370}


def test_sysu_lists_of_the_archive_may_be_matlab_files(copy: Callable[[Path], Path]) -> None:
    root = copy(MINI)
    for path in (root / "exp").iterdir():
        path.unlink()
    for side, ids in (("train", [7, 18, 21]), ("val", [12, 218]), ("test", [23, 30, 370])):
        savemat(root / "exp" / f"{side}_id.mat", {"id": np.array([ids], dtype=np.uint16)})
    assert people(SYSU.train(root)) == {7, 18, 21, 12, 218}
    assert people(SYSU.test(root)) == {23, 30, 370}
    (root / "exp" / "test_id.mat").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"test_id\.mat; see docs/training\.md#sysu"):
        SYSU.test(root)


def test_an_identity_of_the_training_list_without_images_is_named(
    copy: Callable[[Path], Path],
) -> None:
    root = copy(MINI)
    for folder in root.glob("cam*/0018"):
        for image in folder.iterdir():
            image.unlink()
    with pytest.raises(
        DatasetError, match=r"identity 18 \(1 missing in all\) has none.*or drop the"
    ):
        SYSU.train(root)


@pytest.mark.parametrize(
    ("layout", "person"),
    [(SYSU, "cam1/0007"), (LLCM, "test_vis/cam1/0005"), (FOLDER, "rgb/ann")],
)
def test_only_files_are_images_and_only_peoples_folders_people(
    request: pytest.FixtureRequest, copy: Callable[[Path], Path], layout: Layout, person: str
) -> None:
    name = layout.name.value
    root = copy(MINI if layout is SYSU else request.getfixturevalue(f"{name}_root"))
    before = layout.images(root)
    folder = root / person
    if not folder.is_dir():
        folder = next(entry for entry in sorted(folder.parent.iterdir()) if entry.is_dir())
    for place in (folder, folder.parent):
        (place / "@eaDir" / "0001.jpg").mkdir(parents=True)
        (place / "@eaDir" / "0001.jpg" / "thumb.jpg").write_bytes(b"")
        (place / "._0001.jpg").write_bytes(b"")
        (place / ".cache").mkdir()
    os.mkfifo(folder / "0901.jpg")
    (folder / "0902.jpg").symlink_to(root / "nowhere")
    (folder / "0903.jpg").mkdir()
    (folder / "back").symlink_to(root)
    assert layout.images(root) == before


def test_regdb_lists_name_files_only(regdb_root: Path, copy: Callable[[Path], Path]) -> None:
    root = copy(regdb_root)
    image = REGDB.images(root)[0].path
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(DatasetError, match=r"Expected the image .*\(1 missing in all\)"):
        REGDB.images(root)


def test_names_of_people_and_files_need_not_be_text(
    folder_root: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    root = copy(folder_root)
    name = os.fsdecode(b"J\xfcrgen")
    for stream in ("rgb", "ir"):
        (root / stream / "ann").rename(root / stream / name)
        file = next((root / stream / name).iterdir())
        file.rename(file.with_name(f"{name}{file.suffix}"))
    assert len(FOLDER.images(root)) == len(FOLDER.images(folder_root))
    assert person_number(name) in FOLDER.train_ids(root)


def test_an_unknown_name_of_a_list_is_printed_as_written(folder_root: Path, tmp_path: Path) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_text("bob\nBjörk {0}\n")
    with pytest.raises(DatasetError, match=r"/rgb/Björk \{0\}/, but identity Björk \{0\} \(1 m"):
        FOLDER.test(folder_root, ids=FOLDER.read_ids(listed))
    with pytest.raises(DatasetError, match=r"identity Björk \{0\} \(1 missing in all\)"):
        training_samples([folder_root], [listed], DatasetName.FOLDER)
    listed.write_text("99")
    with pytest.raises(DatasetError, match="identity 99 "):
        training_samples([MINI], [listed])


def test_a_wrong_root_is_told_where_the_right_one_is(regdb_root: Path, tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir()
    (above / "RegDB").symlink_to(regdb_root)
    with pytest.raises(DatasetError, match=r"above/idx of the RegDB layout, as .*above/RegDB has"):
        REGDB.train(above)
    with pytest.raises(DatasetError, match="absent, but there is no such folder"):
        REGDB.test(tmp_path / "absent")


def test_the_layout_is_told_from_the_folders(
    regdb_root: Path, llcm_root: Path, folder_root: Path, tmp_path: Path
) -> None:
    roots = {"sysu": MINI, "regdb": regdb_root, "llcm": llcm_root, "folder": folder_root}
    assert {name: find_layout(root).name.value for name, root in roots.items()} == {
        name: name for name in roots
    }
    with pytest.raises(DatasetError, match=r"idx, Visible, Thermal \(regdb\)"):
        find_layout(tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        find_layout(tmp_path / "absent")
