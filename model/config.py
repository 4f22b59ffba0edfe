"""CMTConfig: every size and switch of the network, validated, stored in the checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.modalities import MODALITIES, Modality

__all__ = ["BACKBONE_STRIDE", "MODALITIES", "CMTConfig", "Metric", "Modality"]

Metric = Literal["euclidean", "cosine"]

# torchvision halves the resolution in the stem twice and in layer2 and layer3 once each;
# layer4 keeps it (CMT §4.2: "stride of the last convolutional block from 2 to 1").
BACKBONE_STRIDE = 16


class CMTConfig(BaseModel):
    """What the network is. The defaults are the paper's (§4.2), or named below where it is silent.

    From the paper: `backbone` ResNet-50, input 384×144, `parts` p = 6, both modules on.

    Left open by the paper, chosen here, with the reason:

    - `dim` d = 256 and `gem_p` 3 (10 on RegDB): HCT's values, the paper's own base.
    - `heads` 8, `feed_forward` 4·d, one encoder and one decoder layer: the transformer paper's
      proportions at the least depth that equations (1)-(4) describe.
    - `dropout` 0: the part sequences are six tokens long; weight decay regularises enough.
    - `positional_encoding` "learned": attention alone cannot tell the head stripe from the feet.
    - `compensation_output` "attention": equation (4) taken literally, the weighted sum of values
      through the heads' output projection. "decoder_block" adds residual, norm and feed-forward as
      the transformer paper has them; its residual puts a term into F̂ that is equal for all images.
    - `generator_hidden` d/2: the bottleneck of squeeze-and-excitation, which (12) resembles.
    - `metric` "euclidean": the distance the losses of the paper are written in; training's L_mod,
      evaluation and service all use it. "cosine" has a closed form too, but is no single inner
      product, so that it is searched exhaustively only.
    - `mirror`: rank by the mean of the crop's representation and its mirror image's: a person who
      walks left looks much like one who walks right. It costs a second pass.
    - `normalise_test`: rank by the representation scaled to unit norm over all parts·dim numbers
      (HCT does). The modulation then acts on the normalised representation, in training as well.

    `width` scales all channel counts of the backbone: 1.0 is torchvision's network.
    `modality_alignment` (MAM) and `instance_alignment` (IAM) switch the modules of Table 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    width: float = Field(default=1.0, gt=0, le=4)
    input_height: int = Field(default=384, ge=BACKBONE_STRIDE, le=4096)
    input_width: int = Field(default=144, ge=BACKBONE_STRIDE, le=4096)
    parts: int = Field(default=6, ge=1, le=64)
    dim: int = Field(default=256, ge=1, le=4096)
    gem_p: float = Field(default=3.0, ge=1, le=100)

    heads: int = Field(default=8, ge=1)
    feed_forward: int | None = Field(default=None, ge=1)
    encoder_layers: int = Field(default=1, ge=1, le=12)
    decoder_layers: int = Field(default=1, ge=1, le=12)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    positional_encoding: Literal["none", "learned"] = "learned"
    compensation_output: Literal["attention", "decoder_block"] = "attention"
    modality_alignment: bool = True

    generator_hidden: int | None = Field(default=None, ge=1)
    instance_alignment: bool = True

    metric: Metric = "euclidean"
    normalise_test: bool = False
    mirror: bool = False

    @model_validator(mode="after")
    def _sizes_fit(self) -> CMTConfig:
        if self.feature_height % self.parts:
            step = BACKBONE_STRIDE * self.parts
            raise ValueError(
                f"input_height {self.input_height} gives a feature map of {self.feature_height} "
                f"rows, which {self.parts} parts do not divide; use a multiple of {step}"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.input_height % BACKBONE_STRIDE:
            raise ValueError(
                f"input_height {self.input_height} is not a multiple of {BACKBONE_STRIDE}"
            )
        return self

    @property
    def feature_height(self) -> int:
        """Rows of the backbone's feature map."""
        return self.input_height // BACKBONE_STRIDE

    @property
    def hidden_feed_forward(self) -> int:
        """Width of the transformer's feed-forward layers."""
        return self.feed_forward or 4 * self.dim

    @property
    def hidden_generator(self) -> int:
        """Width between the two linear layers of g_γ and g_β."""
        return self.generator_hidden or max(1, self.dim // 2)

    @property
    def embedding_size(self) -> int:
        """Numbers in one embedding: parts · dim."""
        return self.parts * self.dim
