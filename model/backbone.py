"""Two-stream ResNet (CMT §4.2): one stem and layer1 per modality, layer2 to layer4 shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model import torchvision_compat
from model.config import MODALITIES, CMTConfig

torchvision_compat.prepare()
from torchvision.models import get_model_weights  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

_BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def _layer(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, count: int, stride: int
) -> nn.Sequential:
    """One stage of torchvision's ResNet, with its parameter names."""
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(outputs),
        )
    blocks = [block(inputs, planes, stride, shortcut)]
    blocks += [block(outputs, planes) for _ in range(1, count)]
    return nn.Sequential(*blocks)


class Stem(nn.Module):
    """conv1, bn1, pool and layer1 of one modality: B×3×H×W → B×C×H/4×W/4."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], planes: int, count: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _layer(block, planes, planes, count, stride=1)

    def forward(self, images: Tensor) -> Tensor:
        stem: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer1(stem)  # type: ignore[no-any-return]


class TwoStreamResNet(nn.Module):
    """B×3×H×W and each image's modality → feature map B×C×H/16×W/16.

    Built from torchvision's blocks; at width 1 its parameters have torchvision's names, once per
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
            torchvision network.
        Raises ValueError with the remedy where the weights are not of this network.
        """
        if self.width != 1.0:
            raise ValueError(
                f"ImageNet weights fit width 1.0 only, and this configuration has {self.width}; "
                "set width to 1.0 or start without weights"
            )
        if weights == "imagenet":
            state = get_model_weights(self.name).DEFAULT.get_state_dict(progress=False)
        else:
            state = _read_state(Path(weights))
        own = self.state_dict()
        mapped: dict[str, Tensor] = {}
        for name in own:
            source = name.split(".", 2)[2] if name.startswith("stems.") else name
            if source not in state or state[source].shape != own[name].shape:
                raise ValueError(
                    f"{weights} holds no tensor {source} of shape {tuple(own[name].shape)}; give "
                    f"a state dict of torchvision's {self.name}"
                )
            mapped[name] = state[source]
        self.load_state_dict(mapped)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no weights file {path}; download torchvision's weights to that path")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is no readable state dict; give torchvision's .pth or a .safetensors file"
        ) from error
    return state
