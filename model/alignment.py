"""Modality-level alignment (CMT §3.1): representation encoder, prototypes, compensation decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import CMTConfig


class MultiHeadAttention(nn.Module):
    """Equations (2) and (4) with several heads: softmax(Q Kᵀ / √d_head) V, projected.

    queries B×P×D, source B×S×D → B×P×D.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, source: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:  # B×P×D → B×heads×P×D/heads
            return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

        attended = functional.scaled_dot_product_attention(
            split(self.query(queries)),
            split(self.key(source)),
            split(self.value(source)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        projected: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """The transformer's position-wise network with its residual and norm: B×P×D → B×P×D."""

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.dim, config.hidden_feed_forward)
        self.outer = nn.Linear(config.hidden_feed_forward, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(functional.relu(self.inner(x)))
        return self.norm(x + self.dropout(self.outer(hidden)))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Self-attention with residual and norm: B×P×D → B×P×D."""

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.dim, config.heads, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.attention(x, x)))  # type: ignore[no-any-return]


class RepresentationEncoder(nn.Module):
    """Equations (1) and (2): F → F̃, B×P×D, attention among the parts of one image."""

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        self.position = (
            nn.Parameter(_normal(config, std=0.02))
            if config.positional_encoding == "learned"
            else None
        )
        self.layers = nn.Sequential(
            *(
                nn.Sequential(SelfAttention(config), FeedForward(config))
                for _ in range(config.encoder_layers)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.position is not None:
            features = features + self.position
        return self.layers(features)  # type: ignore[no-any-return]


class CompensationDecoder(nn.Module):
    """Equations (3) and (4): prototypes of the missing modality query an image's encoded parts.

    prototypes B×P×D (P^I for an RGB image, P^R for an IR image), encoded F̃ B×P×D → F̂ B×P×D.
    One decoder serves both directions. Every layer but the last is a full transformer decoder
    block; the last one ends as `compensation_output` says.
    """

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        self.literal = config.compensation_output == "attention"
        layers = range(config.decoder_layers)
        # The feed-forward and norm of the last layer exist only if its output passes them.
        blocks = config.decoder_layers - 1 if self.literal else config.decoder_layers
        self.self_attention = nn.ModuleList(SelfAttention(config) for _ in layers)
        self.cross_attention = nn.ModuleList(
            MultiHeadAttention(config.dim, config.heads, config.dropout) for _ in layers
        )
        self.norm = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(blocks))
        self.feed_forward = nn.ModuleList(FeedForward(config) for _ in range(blocks))

    def start_at_zero(self) -> None:
        """Make F̂ = 0 for every image, where training then starts (literal equation (4) only).

        A network to which this module is added then computes the same as before.
        """
        if self.literal:
            last = self.cross_attention[-1]
            assert isinstance(last, MultiHeadAttention)
            nn.init.zeros_(last.output.weight)
            nn.init.zeros_(last.output.bias)

    def forward(self, prototypes: Tensor, encoded: Tensor) -> Tensor:
        state = prototypes
        for i, (self_attention, cross_attention) in enumerate(
            zip(self.self_attention, self.cross_attention, strict=True)
        ):
            state = self_attention(state)
            compensated: Tensor = cross_attention(state, encoded)
            if i < len(self.norm):
                state = self.feed_forward[i](self.norm[i](state + compensated))
            else:
                state = compensated
        return state


class ModalityAlignment(nn.Module):
    """Encoder, the two sets of learned modality prototypes, and the decoder: F → F̂.

    features F: B×P×D; is_ir: one flag, or B flags. An RGB image gets its compensated IR features
    F̂^I (from prototypes P^I), an IR image F̂^R (from prototypes P^R).
    """

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        self.encoder = RepresentationEncoder(config)
        self.prototypes_rgb = nn.Parameter(_normal(config))
        self.prototypes_ir = nn.Parameter(_normal(config))
        self.decoder = CompensationDecoder(config)

    def forward(self, features: Tensor, is_ir: Tensor | bool) -> Tensor:
        if isinstance(is_ir, bool):
            missing = (self.prototypes_rgb if is_ir else self.prototypes_ir).expand_as(features)
        else:
            missing = torch.where(
                is_ir[:, None, None], self.prototypes_rgb, self.prototypes_ir
            )  # B×P×D
        return self.decoder(missing, self.encoder(features))  # type: ignore[no-any-return]


def _normal(config: CMTConfig, std: float = 1.0) -> Tensor:
    """P×D random numbers."""
    return nn.init.normal_(torch.empty(config.parts, config.dim), std=std)
