"""Exported graphs give PyTorch's numbers at any batch size; one that does not is never written."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from model import CMT, Modulation, load_checkpoint, preprocess, save_checkpoint
from model.cli import main
from model.fixed_batch import IN_FP32_AT_ANY_SIZE
from model.graphs import Graph
from tests.paths import ROOT
from training.export.export import write_export
from training.export.folder import ExportError, check_output, describe
from training.export.formats import OPSET, Onnx, OpenVINO
from training.export.images import LEAST, parity_images

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "deep" / "exported"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(output)]
    assert main(["export", *arguments]) == 0
    return output


@pytest.fixture
def earlier(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export in a folder of its own."""
    return Path(shutil.copytree(exported, tmp_path / "here" / "exported"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_give_pytorchs_numbers_at_any_batch_size(exported: Path, tiny_model: CMT) -> None:
    torch.manual_seed(0)
    core = openvino.Core()
    for batch in (1, 2, 5, 11):
        images = torch.randn(batch, 3, 96, 48)
        embedding = tiny_model.embed(images, "ir")
        modulation = tiny_model.modulation(embedding)
        for name, given, expected in (
            ("embedding-ir", {"images": images}, {"embedding": embedding}),
            ("embedding-rgb", {"images": images}, {"embedding": tiny_model.embed(images, "rgb")}),
            ("modulation", {"embedding": embedding}, modulation._asdict()),
        ):
            feed = {key: tensor.numpy() for key, tensor in given.items()}
            session = onnxruntime.InferenceSession(exported / f"{name}.onnx")
            found = session.run(list(expected), feed)
            file = exported / f"{name}.xml"
            compiled = core.compile_model(file, "CPU", IN_FP32_AT_ANY_SIZE)(feed)
            for one, (key, tensor) in zip(found, expected.items(), strict=True):
                numbers = tensor.detach().numpy()
                np.testing.assert_allclose(one, numbers, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(compiled[key], numbers, rtol=1e-4, atol=1e-5)
    assert modulation.gamma.std(dim=0).max().item() > 0


def test_the_description_says_what_a_user_needs(exported: Path, tiny_checkpoint: Path) -> None:
    facts = json.loads((exported / "export.json").read_text())
    _, info = load_checkpoint(tiny_checkpoint)
    assert facts["fingerprint"] == info.fingerprint
    assert facts["config"] == info.config.model_dump()
    # Of a release that kept numbers only.
    known = {"dataset": "none", "name": "none", "identities": [1, 2], "images": ""}
    assert facts["training"] == {"dataset": "none", "learnt_from": [known]}
    assert {"onnx", "onnxruntime", "openvino", "torch"} <= facts["machine"]["packages"].keys()
    described = {name for graph in facts["graphs"] for name in graph["files"]}
    assert described | {"export.json"} == {path.name for path in exported.iterdir()}
    for graph in facts["graphs"]:
        model = onnx.load(exported / f"{graph['name']}.onnx")
        assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
        for side, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
            assert [(t["name"], t["shape"]) for t in graph[side]] == [
                (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
                for v in values
            ]
    reports = facts["parity"]["formats"]
    assert [report["format"] for report in reports] == ["onnx", "openvino"]
    for report in reports:
        assert {row["batch"] for row in report["outputs"]} == {1, 3, 8}
        assert len(report["outputs"]) == 3 * 4
        assert max(row["relative_error"] for row in report["outputs"]) < 1e-4
        assert [r["queries"] for r in report["rankings"]] == [20, 20, 20]


def test_the_description_says_whom_the_network_knows(tiny_checkpoint: Path) -> None:
    _, info = load_checkpoint(tiny_checkpoint)
    own = {"dataset": "folder", "name": None, "identities": [5], "images": "AAAAAAAA"}
    ancestors = {"dataset": "sysu", "name": "sysu", "identities": [1, 2], "images": "BBBBBBBB"}
    chosen = {"dataset": "folder", "name": None, "identities": [7], "images": "CCCCCCCC"}
    training = {"dataset": "folder", "identities": [5], "learnt_from": [own, ancestors]}
    info = dataclasses.replace(info, training={**training, "selected_on": [chosen]})
    assert describe(info, [], {}, [])["training"] == {
        "dataset": "folder",
        "learnt_from": [own, ancestors],
        "selected_on": [chosen],
    }


class WrongEmbedding(Onnx):
    """Right files, but for one weight tensor of one graph that is a hundredth off."""

    def __init__(self, exported: Path) -> None:
        self.exported = exported

    def write(self, graph: Graph, folder: Path) -> list[Path]:
        model = onnx.load(self.exported / f"{graph.name}.onnx")
        if graph.name == "embedding-ir":
            weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
            noise = 0.01 * np.random.default_rng(0).standard_normal(tuple(weight.dims))
            values = onnx.numpy_helper.to_array(weight) * (1 + noise)
            weight.raw_data = values.astype(np.float32).tobytes()
        onnx.save(model, folder / f"{graph.name}.onnx")
        return [folder / f"{graph.name}.onnx"]


class WrongModulation(OpenVINO):
    """Right files, but for the weights of the modulation, a thousandth too large."""

    def __init__(self, exported: Path) -> None:
        self.exported = exported

    def write(self, graph: Graph, folder: Path) -> list[Path]:
        files = [folder / f"{graph.name}{suffix}" for suffix in (".xml", ".bin")]
        for file in files:
            shutil.copy(self.exported / file.name, file)
        if graph.name == "modulation":
            weights = np.frombuffer(files[1].read_bytes(), dtype=np.float32)
            large = np.abs(weights) > 1e-3  # no shape or axis, whatever else lies there
            files[1].write_bytes(np.where(large, weights * np.float32(1.001), weights).tobytes())
        return files


@pytest.mark.parametrize(
    ("wrong", "graph"),
    [(WrongEmbedding, "onnx embedding-ir"), (WrongModulation, "openvino modulation")],
)
def test_a_wrong_graph_is_refused_and_the_earlier_export_stays(
    wrong: type[WrongEmbedding | WrongModulation],
    graph: str,
    tiny_checkpoint: Path,
    exported: Path,
    earlier: Path,
) -> None:
    model, info = load_checkpoint(tiny_checkpoint)
    images = parity_images(None, info.config)
    before = contents(earlier.parent)
    for output in (earlier, earlier.with_name("new")):
        with pytest.raises(ExportError, match=f"{graph} in batches of 1 differs from PyTorch"):
            write_export(model, info, [wrong(exported)], images, output)
    assert contents(earlier.parent) == before
    assert [path.name for path in earlier.parent.iterdir()] == ["exported"]


def test_a_network_without_modulation_exports_gamma_1_and_beta_0(
    tiny_model: CMT, tmp_path: Path
) -> None:
    model = CMT(tiny_model.config.model_copy(update={"instance_alignment": False})).eval()
    info = save_checkpoint(tmp_path / "plain.safetensors", model)
    images = parity_images(None, info.config)
    (parity,) = write_export(model, info, [OpenVINO()], images, tmp_path / "out")
    assert parity.passed
    gamma, beta = OpenVINO().open(tmp_path / "out" / "modulation.xml")(
        np.ones((4, 6, 16), dtype=np.float32)
    )
    assert gamma.shape == beta.shape == (4, 16)
    assert (gamma == 1).all()
    assert (beta == 0).all()


@pytest.fixture
def folder_images(tmp_path: Path) -> Path:
    """The `folder` layout with just enough images, from examples/."""
    for modality, source in (("rgb", "gallery"), ("ir", "queries")):
        for file in sorted((EXAMPLES / source).glob("*.jpg"))[:LEAST]:
            place = tmp_path / "crops" / modality / file.name.split("_")[0]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return tmp_path / "crops"


def export(checkpoint: Path, output: Path, *options: str | Path) -> int:
    return main(
        ["export", "--checkpoint", str(checkpoint), "--output", str(output), *map(str, options)]
    )


@pytest.fixture
def other_checkpoint(tiny_model: CMT, tmp_path: Path) -> Path:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.parts.weight.mul_(1.5)
    save_checkpoint(tmp_path / "other.safetensors", model)
    return tmp_path / "other.safetensors"


def test_another_checkpoints_export_is_replaced_only_when_asked_and_as_a_whole(
    earlier: Path,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
    folder_images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, same = load_checkpoint(tiny_checkpoint)
    _, other = load_checkpoint(other_checkpoint)
    before = contents(earlier)
    options = ("--format", "openvino", "--images", folder_images)
    check_output(earlier, same.fingerprint, overwrite=False)  # its own checkpoint's needs no asking
    assert export(other_checkpoint, earlier, *options) == 1
    error = capsys.readouterr().err
    assert "export of another checkpoint" in error
    assert "--overwrite" in error
    assert contents(earlier) == before

    assert export(other_checkpoint, earlier, *options, "--overwrite") == 0
    facts = json.loads((earlier / "export.json").read_text())
    assert facts["fingerprint"] == other.fingerprint
    assert {path.suffix for path in earlier.iterdir()} == {".json", ".xml", ".bin"}
    assert [path.name for path in earlier.parent.iterdir()] == ["exported"]
    (report,) = facts["parity"]["formats"]
    assert {ranking["gallery"] for ranking in report["rankings"]} == {LEAST}


def test_bad_input_is_a_sentence_and_nothing_is_written(
    tiny_checkpoint: Path,
    earlier: Path,
    folder_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(output: Path, *options: str | Path) -> str:
        before = contents(tmp_path)
        assert export(tiny_checkpoint, output, *options) in (1, 2)
        assert contents(tmp_path) == before
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    output = tmp_path / "new"
    assert "'tflite' is not one of" in refused(output, "--format", "tflite")
    assert "but there is no such folder" in refused(output, "--images", tmp_path / "nowhere")
    (folder_images / "manifest.csv").write_text("file,modality\nir/gone.jpg,ir\n")
    assert "gone.jpg: No such file or directory; restore" in refused(
        output, "--images", folder_images
    )
    (folder_images / "manifest.csv").write_text("name\nir/gone.jpg\n")
    assert "columns file and modality" in refused(output, "--images", folder_images)
    (folder_images / "manifest.csv").unlink()
    broken, kept = sorted((folder_images / "ir").rglob("*.jpg"))[:2]
    broken.write_bytes(b"no image")
    assert f"{broken} cannot be decoded" in refused(output, "--images", folder_images)
    broken.unlink()
    assert "at least 10 infrared images" in refused(output, "--images", folder_images)
    assert "is a file" in refused(kept)
    assert "holds no export" in refused(tmp_path / "crops")
    (earlier / "notes.txt").write_text("mine")
    assert "holds notes.txt beside an export" in refused(earlier, "--overwrite")


def test_outside_a_clone_images_must_be_given(
    tiny_model: CMT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("training.export.images.EXAMPLES", tmp_path)
    with pytest.raises(ValueError, match="give --images FOLDER"):
        parity_images(None, tiny_model.config)


def test_the_documented_snippets_run(
    exported: Path,
    tiny_model: CMT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    assert len(blocks) == 2
    (tmp_path / "exported").symlink_to(exported)
    files = {
        "ir": shutil.copy(next((EXAMPLES / "queries").iterdir()), tmp_path / "query.jpg"),
        "rgb": shutil.copy(next((EXAMPLES / "gallery").iterdir()), tmp_path / "gallery.jpg"),
    }
    x, y = (
        tiny_model.embed(preprocess(Image.open(files[m]), tiny_model.config)[None], m)
        for m in ("ir", "rgb")
    )
    modulation = tiny_model.modulation(x)
    expected = float(tiny_model.distance(x, y, modulation))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert names["distance"] == pytest.approx(expected, rel=1e-3)
    for name in ("x", "y", "gamma", "beta"):
        del names[name]
    exec(blocks[1], names)
    again = Modulation(*(torch.tensor(names[name]) for name in Modulation._fields))
    again_x, again_y = (torch.tensor(names[name]) for name in ("x", "y"))
    assert float(tiny_model.distance(again_x, again_y, again)) == pytest.approx(expected, rel=1e-3)
