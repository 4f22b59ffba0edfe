"""Two-stream ResNet (CMT §4.2): one stem and layer1 per modality, layer2 to layer4 shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model import torchvision_compat
from model.config import MODALITIES, CMTConfig


class BasicBlock(nn.Module):
    """Two convolutions of 3×3 beside a shortcut (He et al., 2016, Figure 5 left): ResNet-18, -34.

    The blocks are written here, with torchvision's names, order and arithmetic, because to import
    its models takes a second at every start of the service.
    """

    expansion = 1

    def __init__(
        self, inputs: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        added: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return added


class Bottleneck(nn.Module):
    """Convolutions of 1×1, 3×3 and 1×1 beside a shortcut (the same, right): ResNet-50.

    The stride is that of the 3×3 convolution, as in torchvision and its weights.
    """

    expansion = 4

    def __init__(
        self, inputs: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        added: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return added


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


_BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
# What a file of torchvision's weights may hold or lack beside the tensors of the backbone.
_CLASSIFIER = ("fc.weight", "fc.bias")
_COUNTER = ".num_batches_tracked"
_PARALLEL = "module."


def _layer(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, count: int, stride: int
) -> nn.Sequential:
    """One stage of torchvision's ResNet, with its parameter names."""
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    blocks = [block(inputs, planes, stride, shortcut)]
    blocks += [block(outputs, planes) for _ in range(1, count)]
    return nn.Sequential(*blocks)


class Stem(nn.Module):
    """conv1, bn1, pool and layer1 of one modality: B×3×H×W → B×C×H/4×W/4."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], planes: int, count: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, planes, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _layer(block, planes, planes, count, stride=1)

    def forward(self, images: Tensor) -> Tensor:
        stem: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer1(stem)  # type: ignore[no-any-return]


class TwoStreamResNet(nn.Module):
    """B×3×H×W and each image's modality → feature map B×C×H/16×W/16.

    At width 1 its parameters have torchvision's names, once per
    modality for the stem and layer1.
    """

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        block, counts = _BLOCKS[config.backbone]
        planes = [max(1, round(64 * config.width)) * scale for scale in (1, 2, 4, 8)]
        self.name = config.backbone
        self.width = config.width
        self.stems = nn.ModuleDict({m: Stem(block, planes[0], counts[0]) for m in MODALITIES})
        channels = planes[0] * block.expansion
        self.layer2 = _layer(block, channels, planes[1], counts[1], stride=2)
        self.layer3 = _layer(block, planes[1] * block.expansion, planes[2], counts[2], stride=2)
        self.layer4 = _layer(block, planes[2] * block.expansion, planes[3], counts[3], stride=1)
        self.channels = planes[3] * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, is_ir: Tensor | bool) -> Tensor:
        """Images → feature map. is_ir: one flag for the batch, or a boolean tensor of B flags."""
        if isinstance(is_ir, bool):
            low = self.stems["ir" if is_ir else "rgb"](images)
        else:
            streams = self.stems["rgb"](images[~is_ir]), self.stems["ir"](images[is_ir])
            # Concatenate, then put every image back into its place in the batch.
            order = torch.cat([(~is_ir).nonzero(), is_ir.nonzero()]).flatten().argsort()
            low = torch.cat(streams)[order]
        return self.layer4(self.layer3(self.layer2(low)))  # type: ignore[no-any-return]

    def load_imagenet(self, weights: str | Path) -> None:
        """Load ImageNet classification weights into both stems and the shared layers.

        weights: "imagenet" fetches torchvision's default weights (needs a network); a path is a
            local `.pth` (read without unpickling code) or `.safetensors` state dict of the same
            torchvision network. Its classifier is left aside. Batch norm's counters of batches
            may be missing, as in the files of torchvision's first weights (267 tensors of
            ResNet-50): nothing is computed from them, and they start at 0.
        Raises ValueError with the remedy where the weights are not of this network.
        """
        if self.width != 1.0:
            raise ValueError(
                f"ImageNet weights fit width 1.0 only, and this configuration has {self.width}; "
                "set width to 1.0 or start without weights"
            )
        state = _fetched(self.name) if weights == "imagenet" else _read_state(Path(weights))
        own = self.state_dict()
        sources = {name: _torchvision_name(name) for name in own}
        self._check_torchvision(weights, state, {sources[name]: own[name] for name in own})
        self.load_state_dict(
            {
                name: state[source] if source in state else torch.zeros_like(own[name])
                for name, source in sources.items()
            }
        )

    def _check_torchvision(
        self, weights: str | Path, state: Mapping[str, Any], expected: Mapping[str, Tensor]
    ) -> None:
        """Raises ValueError unless `state` holds the `expected` tensors and nothing unknown."""
        remedy = f"give a state dict of torchvision's {self.name}"
        for name, tensor in expected.items():
            given = state.get(name)
            if given is None and name.endswith(_COUNTER):
                continue
            if not isinstance(given, Tensor) or given.shape != tensor.shape:
                raise ValueError(
                    f"{weights} holds no tensor {name} of shape {tuple(tensor.shape)}; {remedy}"
                )
            if given.is_floating_point() != tensor.is_floating_point():
                raise ValueError(f"{weights} holds {name} as {given.dtype}; {remedy}")
            if not given.isfinite().all():
                raise ValueError(
                    f"{weights} holds numbers in {name} that are not finite; fetch it again"
                )
        unknown = sorted(
            str(name) for name in state if name not in expected and name not in _CLASSIFIER
        )
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(
                f"{weights} holds {unknown[0]}{more}, which torchvision's {self.name} does not "
                f"have: it is of another network; {remedy}"
            )


def _torchvision_name(name: str) -> str:
    """The name in torchvision's network of a tensor of this one."""
    return name.split(".", 2)[2] if name.startswith("stems.") else name


def _fetched(name: str) -> Mapping[str, Any]:
    """torchvision's default weights of a network, from its cache or the network."""
    torchvision_compat.prepare()
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    try:
        return weights.get_state_dict(progress=False)  # type: ignore[no-any-return]
    except OSError as error:
        raise ValueError(
            f"{weights.url} cannot be fetched ({error}); download it elsewhere and give the file "
            "in the place of 'imagenet'"
        ) from error


def _read_state(path: Path) -> Mapping[str, Any]:
    """The state dict in a file, on the CPU, by the names that torchvision's network has.

    Training scripts save it under "state_dict" or "model", and DataParallel puts "module." before
    every name. Raises ValueError where the file is missing or none.
    """
    if not path.is_file():
        raise ValueError(f"no weights file {path}; download torchvision's weights to that path")
    remedy = "give torchvision's .pth or a .safetensors file"
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no readable state dict; {remedy}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} is no readable state dict; {remedy}")
    return {str(name).removeprefix(_PARALLEL): value for name, value in state.items()}
