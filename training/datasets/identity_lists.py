"""The text files beside the images: identity lists and indices of images."""

from pathlib import Path

from model.image_files import find_images
from training.datasets.matfile import read_mat
from training.datasets.sample import DatasetError, DatasetName


def read_ids(path: Path, dataset: DatasetName | None = None, *, lowest: int = 1) -> list[int]:
    """Read an identity list such as ``exp/train_id.txt``, ascending and without repeats.

    path: comma-separated text, or the ``.mat`` form of the original SYSU-MM01 archive (one
        numeric array, under the key ``id``).
    dataset: whose documentation an error names.
    lowest: the smallest number that is an identity.
    Raises DatasetError where the file is missing, empty or not a list of whole numbers from
    `lowest`.
    """
    values = (_ids_from_mat if path.suffix == ".mat" else _ids_from_text)(path, dataset)
    if not values or min(values) < lowest:
        raise DatasetError(
            f"Expected identities of {lowest} and above in {path}, separated by commas.", dataset
        )
    return sorted(set(values))


def read_text(path: Path, dataset: DatasetName | None = None) -> str:
    """The text of a list that the layout needs.

    Raises DatasetError where it is missing or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DatasetError(
            f"Expected the list {path}, but there is no such file.", dataset
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"Expected UTF-8 text in {path}.", dataset) from error


def read_index(root: Path, path: Path, dataset: DatasetName) -> list[tuple[Path, int]]:
    """Read lines ``relative/path label``, as RegDB and LLCM list their images.

    The label is only checked to be a number: both sets number their training and test people from
    0 each, so that a label alone names two people. The person is the folder that the image is in.

    Returns absolute path and the number of the image's folder, in the order of the lines.
    Raises DatasetError where the file is missing or empty, a line has another form, an image is not
    in a numbered folder or not on disk, or two folders share a label.
    """
    rows: list[tuple[Path, int]] = []
    folder_of_label: dict[int, str] = {}
    for number, line in enumerate(read_text(path, dataset).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        image = root / name.strip()
        if not name or not label.isdecimal() or not image.parent.name.isdecimal():
            raise DatasetError(
                f"Expected 'folder/person/image label' in line {number} of {path}, not {line!r}.",
                dataset,
            )
        if folder_of_label.setdefault(int(label), image.parent.name) != image.parent.name:
            raise DatasetError(
                f"Line {number} of {path} gives the label {label} to the folders "
                f"{folder_of_label[int(label)]} and {image.parent.name}; a label is one person.",
                dataset,
            )
        rows.append((image, int(image.parent.name)))
    if not rows:
        raise DatasetError(f"Expected lines 'folder/person/image label' in {path}.", dataset)
    # A listing of each folder once: asking for every file by itself takes minutes on a network.
    folders = {image.parent for image, _ in rows}
    present = {image for folder in folders for image in find_images(folder, below=False).images}
    absent = [image for image, _ in rows if image not in present]
    if absent:
        raise DatasetError(
            f"Expected the image {absent[0]} ({len(absent)} missing in all) that {path} lists.",
            dataset,
        )
    return rows


def _ids_from_text(path: Path, dataset: DatasetName | None) -> list[int]:
    if not path.is_file():
        raise DatasetError(
            f"Expected the identity list {path}, but there is no such file.", dataset
        )
    try:
        return [int(word) for word in read_text(path, dataset).replace(",", " ").split()]
    except ValueError as error:
        raise DatasetError(
            f"Expected whole numbers separated by commas in {path}.", dataset
        ) from error


def _ids_from_mat(path: Path, dataset: DatasetName | None) -> list[int]:
    if not path.is_file():
        raise DatasetError(
            f"Expected the identity list {path}, but there is no such file.", dataset
        )
    values = read_mat(path, "id").ravel()
    try:
        return [int(value) for value in values]
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"Expected whole numbers under the key 'id' in {path}.", dataset
        ) from error
