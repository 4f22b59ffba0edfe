"""The network against float64 loops written from the paper, and what may depend on what."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import CMT, CMTConfig, Modality, Strength, modulation_of, preprocess, torchvision_compat
from model.alignment import (
    CompensationDecoder,
    FeedForward,
    MultiHeadAttention,
    RepresentationEncoder,
    SelfAttention,
)
from model.cmt import Modulator, ranked_mean
from model.parts import PartFeatures

torchvision_compat.prepare()  # tests compare with its own networks

SIZES = {"parts": 3, "dim": 8, "heads": 2, "input_height": 48, "input_width": 32}

Rows = list[list[float]]


def config(**changes: object) -> CMTConfig:
    return CMTConfig.model_validate({"backbone": "resnet18", "width": 0.125, **SIZES, **changes})


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 48, 32, generator=torch.Generator().manual_seed(seed))


def rows(tensor: torch.Tensor) -> Rows:
    numbers: Rows = tensor.tolist()
    return numbers


def linear(layer: torch.nn.Linear, x: Rows) -> Rows:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        [
            sum(w * v for w, v in zip(ws, row, strict=True)) + b
            for ws, b in zip(weight, bias, strict=True)
        ]
        for row in x
    ]


def plain_attention(module: MultiHeadAttention, queries: Rows, source: Rows) -> Rows:
    """Equations (2) and (4), one head after the other, for one sample of lists."""
    q, k, v = (
        linear(module.query, queries),
        linear(module.key, source),
        linear(module.value, source),
    )
    size = len(q[0]) // module.heads
    joined = []
    for row in q:
        outputs = []
        for h in range(module.heads):
            part = slice(h * size, (h + 1) * size)
            scores = [
                sum(a * b for a, b in zip(row[part], key[part], strict=True)) / math.sqrt(size)
                for key in k
            ]
            largest = max(scores)
            weights = [math.exp(s - largest) for s in scores]
            total = sum(weights)
            outputs += [
                sum(w / total * value[part][c] for w, value in zip(weights, v, strict=True))
                for c in range(size)
            ]
        joined.append(outputs)
    return linear(module.output, joined)


def plain_norm(norm: torch.nn.LayerNorm, x: Rows) -> Rows:
    result = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        result.append(
            [
                (v - mean) / math.sqrt(variance + norm.eps) * g + b
                for v, g, b in zip(row, norm.weight.tolist(), norm.bias.tolist(), strict=True)
            ]
        )
    return result


def add(a: Rows, b: Rows) -> Rows:
    return [[x + y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def plain_feed_forward(module: FeedForward, x: Rows) -> Rows:
    hidden = [[max(0.0, v) for v in row] for row in linear(module.inner, x)]
    return plain_norm(module.norm, add(x, linear(module.outer, hidden)))


def test_encoder_is_equations_1_and_2() -> None:
    torch.manual_seed(0)
    encoder = RepresentationEncoder(config()).double()
    features = torch.randn(2, 3, 8, dtype=torch.float64)
    result = encoder(features)
    assert encoder.position is not None
    attention, feed_forward = encoder.layers[0].children()
    assert isinstance(attention, SelfAttention)
    assert isinstance(feed_forward, FeedForward)
    for sample in range(2):
        x = add(rows(features[sample]), rows(encoder.position))
        x = plain_norm(attention.norm, add(x, plain_attention(attention.attention, x, x)))
        expected = torch.tensor(plain_feed_forward(feed_forward, x), dtype=torch.float64)
        torch.testing.assert_close(result[sample], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["attention", "decoder_block"])
def test_decoder_is_equations_3_and_4_in_both_forms(form: str) -> None:
    torch.manual_seed(1)
    decoder = CompensationDecoder(config(compensation_output=form)).double()
    prototypes = torch.randn(3, 8, dtype=torch.float64)
    encoded = torch.randn(2, 3, 8, dtype=torch.float64)
    result = decoder(prototypes.expand_as(encoded), encoded)
    own, across = decoder.self_attention[0], decoder.cross_attention[0]
    assert isinstance(own, SelfAttention)
    assert isinstance(across, MultiHeadAttention)
    for sample in range(2):
        p = rows(prototypes)
        p = plain_norm(own.norm, add(p, plain_attention(own.attention, p, p)))
        expected = plain_attention(across, p, rows(encoded[sample]))
        if form == "decoder_block":
            norm, feed_forward = decoder.norm[0], decoder.feed_forward[0]
            assert isinstance(norm, torch.nn.LayerNorm)
            assert isinstance(feed_forward, FeedForward)
            expected = plain_feed_forward(feed_forward, plain_norm(norm, add(p, expected)))
        torch.testing.assert_close(
            result[sample], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11
        )


def test_part_pooling_is_the_generalised_mean_per_stripe() -> None:
    torch.manual_seed(2)
    parts = PartFeatures(channels=4, parts=3, dim=5, gem_p=3.0).double().eval()
    feature_map = torch.rand(2, 4, 6, 2, dtype=torch.float64)
    result = parts(feature_map)
    running_mean, running_var = parts.norm.running_mean, parts.norm.running_var
    assert running_mean is not None
    assert running_var is not None
    for sample in range(2):
        for part in range(3):
            pooled = []
            for channel in range(4):
                stripe = feature_map[sample, channel, 2 * part : 2 * part + 2].flatten().tolist()
                pooled.append((sum(v**3 for v in stripe) / len(stripe)) ** (1 / 3))
            for d in range(5):
                index = part * 5 + d
                reduced = sum(
                    value * parts.weight[part, channel, d].item()
                    for channel, value in enumerate(pooled)
                )
                normed = (reduced - running_mean[index].item()) / math.sqrt(
                    running_var[index].item() + parts.norm.eps
                )
                assert result[sample, part, d].item() == pytest.approx(max(0.0, normed), rel=1e-9)


@pytest.mark.parametrize("gem_p", [1.0, 3.0, 10.0, 30.0])
def test_pooling_of_nearly_dark_stripes_has_finite_gradients(gem_p: float) -> None:
    parts = PartFeatures(channels=4, parts=3, dim=5, gem_p=gem_p)
    feature_map = torch.full((2, 4, 6, 2), 1e-5)
    feature_map[0] = 0.5
    feature_map.requires_grad_()
    pooled = parts.pool(feature_map)
    torch.testing.assert_close(pooled[0], torch.full((3, 4), 0.5))
    torch.autograd.backward(pooled.sum())
    assert feature_map.grad is not None
    assert feature_map.grad.isfinite().all()


def test_complete_representation_and_generators_are_equations_5_and_12(tiny_model: CMT) -> None:
    x = torch.randn(2, 3, 96, 48, generator=torch.Generator().manual_seed(3))
    output = tiny_model(x, "ir")
    torch.testing.assert_close(output.complete, output.features + output.compensated)
    norms = output.embedding.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))
    double = copy.deepcopy(tiny_model).double()
    embedding = output.embedding.detach().double()
    gamma, beta = double.modulation(embedding)
    for sample in range(2):
        parts = rows(embedding[sample])
        pooled = [sum(column) / len(parts) for column in zip(*parts, strict=True)]
        for generator, result in ((double.generator_gamma, gamma), (double.generator_beta, beta)):
            assert generator is not None
            hidden = [[max(0.0, v) for v in linear(generator.inner, [pooled])[0]]]
            expected = linear(generator.outer, hidden)[0]
            assert result[sample].tolist() == pytest.approx(expected, rel=1e-9)


def test_a_query_is_modulated_in_numpy_as_by_the_modules_and_by_itself() -> None:
    torch.manual_seed(2)
    model = CMT(config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(5, 3, 8)
    for model.strength in (None, Strength(0.6, 1.7)):
        modulator = Modulator(model)
        together = modulator(x)
        torch.testing.assert_close(together, modulation_of(model, x))
        assert together.gamma.std(0).min() > 0
        for i in range(len(x)):
            for alone, of_all in zip(modulator(x[i : i + 1]), together, strict=True):
                assert torch.equal(alone[0], of_all[i])


def test_modulation_starts_as_the_identity_and_without_the_module_stays_it() -> None:
    x = torch.randn(4, 3, 8)
    for model in (CMT(config()), CMT(config(instance_alignment=False))):
        for gamma, beta in (model.modulation(x), Modulator(model)(x)):
            assert torch.equal(gamma, torch.ones(4, 8))
            assert torch.equal(beta, torch.zeros(4, 8))


@pytest.mark.parametrize(
    ("modality", "deaf_to", "moved_by"),
    [("rgb", "prototypes_rgb", "prototypes_ir"), ("ir", "prototypes_ir", "prototypes_rgb")],
)
def test_an_image_depends_on_its_own_stem_and_the_missing_prototypes_only(
    modality: Modality, deaf_to: str, moved_by: str
) -> None:
    torch.manual_seed(4)
    model = CMT(config()).eval()
    x, other = images(2), "ir" if modality == "rgb" else "rgb"
    before = model.embed(x, modality)

    def after(prefix: str) -> torch.Tensor:
        """The embedding once the parameters whose names begin so have other values."""
        changed = copy.deepcopy(model)
        chosen = [p for name, p in changed.named_parameters() if name.startswith(prefix)]
        assert chosen
        with torch.no_grad():
            for parameter in chosen:
                parameter.add_(torch.randn_like(parameter))
        return changed.embed(x, modality)

    assert torch.equal(after(f"backbone.stems.{other}."), before)
    assert torch.equal(after(f"alignment.{deaf_to}"), before)
    assert not torch.allclose(after(f"backbone.stems.{modality}."), before)
    assert not torch.allclose(after(f"alignment.{moved_by}"), before)


def test_a_mixed_batch_equals_its_images_one_by_one() -> None:
    torch.manual_seed(5)
    model = CMT(config()).eval()
    x = images(5)
    modalities: list[Modality] = ["ir", "rgb", "rgb", "ir", "rgb"]
    mixed = model.embed(x, modalities)
    assert mixed.shape == (5, 3, 8)
    for i, modality in enumerate(modalities):
        torch.testing.assert_close(mixed[i], model.embed(x[i : i + 1], modality)[0])


@pytest.mark.parametrize("normalised", [False, True])
def test_mirror_ranks_by_the_mean_with_the_mirror_image(normalised: bool) -> None:
    plain = CMT(config(normalise_test=normalised)).eval()
    both = CMT(config(normalise_test=normalised, mirror=True)).eval()
    both.load_state_dict(plain.state_dict())
    crops = images(3)
    modality: tuple[Modality, ...] = ("rgb", "ir", "rgb")
    with torch.inference_mode():
        seen, mirrored = (plain(x, modality).complete for x in (crops, crops.flip(3)))
    expected = plain.ranked_form((seen + mirrored) / 2)
    torch.testing.assert_close(both.embed(crops, modality), expected)
    torch.testing.assert_close(both.embed(crops.flip(3), modality), expected)
    views = torch.stack([seen, mirrored]).numpy()
    in_numpy = torch.from_numpy(ranked_mean(views, normalise=normalised))
    torch.testing.assert_close(in_numpy, expected)
    torch.testing.assert_close(both(crops, modality).complete, seen)  # training sees one side
    torch.testing.assert_close(both.embed(crops[:1], "rgb"), expected[:1])


def test_gradients_reach_prototypes_generators_and_both_stems() -> None:
    torch.manual_seed(6)
    model = CMT(config())
    output = model(images(6), ["rgb", "ir"] * 3)
    modulation = model.modulation(output.embedding[:2])
    distance = model.distance(output.embedding[:2], output.embedding[2:], modulation)
    torch.autograd.backward(distance.sum() + output.compensated.square().sum())
    names = [
        "alignment.prototypes_rgb",
        "alignment.prototypes_ir",
        "generator_gamma.outer.weight",
        "generator_beta.outer.bias",
        "backbone.stems.rgb.conv1.weight",
        "backbone.stems.ir.conv1.weight",
    ]
    parameters = dict(model.named_parameters())
    for name in names:
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(("mam", "iam"), [(False, False), (True, False), (False, True)])
def test_the_switches_remove_the_modules(mam: bool, iam: bool) -> None:
    model = CMT(config(modality_alignment=mam, instance_alignment=iam)).eval()
    output = model(images(2), "rgb")
    assert (output.compensated is None) == (not mam)
    assert any("alignment." in name for name, _ in model.named_parameters()) == mam
    assert any("generator" in name for name, _ in model.named_parameters()) == iam
    if not mam:
        assert torch.equal(output.complete, output.features)


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
def test_deeper_backbones_and_layers_run(backbone: str) -> None:
    model = CMT(config(backbone=backbone, encoder_layers=2, decoder_layers=2)).eval()
    assert model.embed(images(2), "ir").shape == (2, 3, 8)


def test_imagenet_weights_of_a_local_file_go_into_both_stems(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(7)
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    model = CMT(config(width=1.0), weights=tmp_path / "resnet18.pth")
    own = model.backbone.state_dict()
    for stem in ("stems.rgb", "stems.ir"):
        assert torch.equal(own[f"{stem}.conv1.weight"], state["conv1.weight"])
        assert torch.equal(own[f"{stem}.layer1.1.bn2.weight"], state["layer1.1.bn2.weight"])
    assert torch.equal(own["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])


def torchvision_state(name: str) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, batch norm's counters among them."""
    import torchvision.models

    torch.manual_seed(7)
    return dict(getattr(torchvision.models, name)().state_dict())


def without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As torchvision's first weights are, which were saved before there were counters."""
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("name", "tensors"), [("resnet18", 102), ("resnet34", 182)])
def test_torchvisions_first_weights_have_no_counters(
    name: str, tensors: int, tmp_path: Path
) -> None:
    state = without_counters(torchvision_state(name))
    assert len(state) == tensors
    torch.save(state, tmp_path / "v1.pth", _use_new_zipfile_serialization=False)
    own = CMT(config(width=1.0, backbone=name), weights=tmp_path / "v1.pth").backbone.state_dict()
    assert torch.equal(own["stems.ir.bn1.running_var"], state["bn1.running_var"])
    assert torch.equal(own["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert {int(own[n]) for n in own if n.endswith("num_batches_tracked")} == {0}


def test_both_of_torchvisions_resnet50_and_what_training_scripts_make_of_it(tmp_path: Path) -> None:
    second = torchvision_state("resnet50")
    first = without_counters(second)
    assert (len(first), len(second)) == (267, 320)
    second["layer3.5.bn3.num_batches_tracked"] += 5
    headless = {n: t for n, t in first.items() if not n.startswith("fc.")}
    files: dict[str, object] = {
        "resnet50-first.pth": first,
        "resnet50-second.pth": second,
        "headless.pth": headless,
        "parallel.pth": {"epoch": 90, "state_dict": {f"module.{n}": t for n, t in first.items()}},
    }
    backbone = CMT(config(width=1.0, backbone="resnet50")).backbone
    for number, (name, content) in enumerate(files.items()):
        torch.save(content, tmp_path / name)
        with torch.no_grad():
            backbone.get_parameter("layer4.2.conv3.weight").fill_(number)
        backbone.load_imagenet(tmp_path / name)
        own = backbone.state_dict()
        assert torch.equal(own["layer4.2.conv3.weight"], first["layer4.2.conv3.weight"])
        assert torch.equal(own["stems.rgb.layer1.2.bn3.bias"], first["layer1.2.bn3.bias"])
        assert int(own["layer3.5.bn3.num_batches_tracked"]) == (5 if "second" in name else 0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_feature_map_equals_torchvisions_with_layer4_at_stride_1(name: str) -> None:
    import torchvision.models

    torch.manual_seed(8)
    reference = getattr(torchvision.models, name)().eval()
    model = CMT(config(width=1.0, backbone=name)).eval()
    # Their order too: of random numbers at the start, and of an optimiser's state.
    names = [n.removeprefix("stems.rgb.") for n, _ in model.backbone.named_parameters()]
    stem_and_rest = [n for n in names if not n.startswith("stems.ir.")]
    assert stem_and_rest == [n for n, _ in reference.named_parameters() if n[:3] != "fc."]
    own = model.backbone.state_dict()
    state = reference.state_dict()
    model.backbone.load_state_dict(
        {n: state[n.split(".", 2)[2] if n.startswith("stems.") else n] for n in own}
    )
    first = reference.layer4[0]
    (first.conv1 if name == "resnet18" else first.conv2).stride = (1, 1)
    reference.layer4[0].downsample[0].stride = (1, 1)
    x = images(2)
    expected = torch.nn.Sequential(*list(reference.children())[:-2])(x)
    torch.testing.assert_close(model.backbone(x, False), expected)


def test_wrong_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    from torchvision.models import resnet34

    with pytest.raises(ValueError, match=r"width 1\.0 only"):
        CMT(config(), weights="imagenet")
    with pytest.raises(ValueError, match="no weights file"):
        CMT(config(width=1.0), weights=tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="no readable state dict"):
        CMT(config(width=1.0), weights=tmp_path / "text.pth")
    state = resnet34().state_dict()
    state["conv1.weight"] = state["conv1.weight"][:8]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"conv1\.weight of shape \(64, 3, 7, 7\)"):
        CMT(config(width=1.0), weights=tmp_path / "other.pth")


def test_weights_of_another_network_are_refused_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    backbone = CMT(config(width=1.0)).backbone

    def refused(content: object, match: str) -> None:
        torch.save(content, tmp_path / "odd.pth")
        before = backbone.get_parameter("layer2.0.bn1.weight").clone()
        with pytest.raises(ValueError, match=match):
            backbone.load_imagenet(tmp_path / "odd.pth")
        assert torch.equal(backbone.get_parameter("layer2.0.bn1.weight"), before)

    state = without_counters(torchvision_state("resnet18"))
    # A deeper network holds all tensors of this one, and more.
    refused(torchvision_state("resnet34"), r"holds layer1\.2\.bn1.* more, which .* resnet18")
    refused(
        state | {"layer1.0.se.fc1.weight": torch.zeros(4)}, r"holds layer1\.0\.se\.fc1\.weight,"
    )
    refused({n: t for n, t in state.items() if n != "bn1.bias"}, r"no tensor bn1\.bias of shape")
    refused(state | {"bn1.bias": [0.0] * 64}, r"no tensor bn1\.bias of shape")
    refused(state | {"bn1.bias": torch.zeros(64, dtype=torch.int32)}, r"bn1\.bias as torch\.int32")
    refused(state | {"bn1.bias": torch.full((64,), torch.nan)}, r"in bn1\.bias that are not finite")
    refused({f"backbone.{n}": t for n, t in state.items()}, r"no tensor conv1\.weight")
    refused([state], "no readable state dict")
    refused({}, "no readable state dict")


def test_weights_are_read_without_unpickling_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "was here",)

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no readable state dict"):
        CMT(config(width=1.0), weights=tmp_path / "evil.pth")
    assert not (tmp_path / "was here").exists()


def test_bad_input_is_refused_with_a_sentence() -> None:
    model = CMT(config()).eval()
    with pytest.raises(ValueError, match="expected B×3×48×32"):
        model.embed(torch.zeros(2, 3, 32, 48), "rgb")
    with pytest.raises(ValueError, match="'thermal'; use 'rgb' or 'ir'"):
        model.embed(images(2), "thermal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 modalities for 2 images"):
        model.embed(images(2), ["rgb"])
    with pytest.raises(ValueError, match="multiple of 96"):
        CMTConfig(input_height=400)
    with pytest.raises(ValueError, match="not a multiple of heads"):
        CMTConfig(dim=100)


def test_preprocess_resizes_and_normalises_and_replicates_gray() -> None:
    pixels = preprocess(Image.new("RGB", (77, 223), (255, 0, 128)), config())
    assert pixels.shape == (3, 48, 32)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    assert pixels[:, 5, 5].tolist() == pytest.approx(expected, rel=1e-5)
    gray = preprocess(Image.new("L", (20, 40), 100), config())
    back = gray * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    back = back + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(back, torch.full_like(back, 100 / 255))
