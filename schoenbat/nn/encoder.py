"""The Long Range Arena model: a small pre-norm encoder, masked mean pooling, and a classifier for one or two texts.

The set-up is that of Skyformer (NeurIPS 2021), which SchoenbAt's experiments use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from schoenbat.attention import ATTENTIONS, check_kernel
from schoenbat.errors import UserError, unknown_name
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.nn.multihead import FORMERS, FormerConfig, SelfAttention
from schoenbat.registry import build_config, check_bounds

POSITION_STEP = 64
"""The table of positions is rounded up to a multiple of this, as batches are padded to one."""

MAX_LAYERS, MAX_WIDTH = 1000, 2**16


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the encoder; `head_width` is the hidden layer of the classifier."""

    num_layers: int = 2
    width: int = 64
    ffn_width: int = 128
    num_heads: int = 2
    dropout: float = 0.1
    head_width: int = 128

    def __post_init__(self) -> None:
        wide = (1, MAX_WIDTH)
        check_bounds(self, num_layers=(1, MAX_LAYERS), width=wide, ffn_width=wide, num_heads=wide, head_width=wide)
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} cannot be split over {self.num_heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: SelfAttention, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.ffn_width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn_width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), key_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Encoder(nn.Module):
    """Tokens [B, N] and key_mask [B, N] to one vector per text, [B, width]: the mean over its real tokens."""

    def __init__(self, blocks: list[Block], *, vocab_size: int, max_length: int, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(-(-max_length // POSITION_STEP) * POSITION_STEP, config.width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, key_mask: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions[: tokens.shape[-1]])
        for block in self.blocks:
            x = block(x, key_mask)
        weights = key_mask[..., None].to(torch.float32)
        return (self.norm(x).float() * weights).sum(-2) / weights.sum(-2).clamp_min(1)


class Classifier(nn.Module):
    """One encoder for all texts of an example, then Linear-ReLU-Linear.

    Two texts with vectors a and b are classified from [a, b, a * b, a - b].
    """

    def __init__(self, encoder: Encoder, *, num_texts: int, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        assert num_texts in (1, 2)
        self.encoder = encoder
        inputs = config.width if num_texts == 1 else 4 * config.width
        self.head = nn.Sequential(
            nn.Linear(inputs, config.head_width), nn.ReLU(), nn.Linear(config.head_width, num_classes)
        )

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes] for tokens and key_mask of shape [B, num_texts, N]; by default token 0 is padding."""
        batch, num_texts, _ = tokens.shape
        if key_mask is None:
            key_mask = tokens != 0
        encoded = self.encoder(tokens.flatten(0, 1), key_mask.flatten(0, 1)).unflatten(0, (batch, num_texts))
        if num_texts == 1:
            return self.head(encoded[:, 0])
        a, b = encoded[:, 0], encoded[:, 1]
        return self.head(torch.cat([a, b, a * b, a - b], dim=-1))


def build_model(
    *,
    vocab_size: int,
    num_classes: int,
    num_texts: int,
    max_length: int,
    model: ModelConfig,
    attn: str,
    attention: Mapping[str, Any] | None,
    dotf: str | None,
    former: str,
    former_config: FormerConfig,
    seed: int,
) -> Classifier:
    """A model whose weights and random features are a pure function of the arguments.

    Args:
        attn: name of the attention mechanism; `attention` is its section of options, built strictly.
        dotf: name of the kernel, for the mechanisms that need one.
        former: "maclauformer" or "transformer".

    Raises:
        UserError: an unknown name or option, a kernel missing or superfluous, or one that the former cannot keep
            inside its radius of convergence.
    """
    attention_class = ATTENTIONS.get(attn)
    config: Any = build_config(attention_class.Config, attention, f"attention.{attn}")
    kernel = _kernel_for(attn, dotf, former)
    for option in ("power", "temperature"):
        if getattr(former_config, option) and former != "maclauformer":
            raise UserError(f"former {former!r} has no SBN, so it takes no option {option!r}")
    head_dim = model.width // model.num_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = []
        for layer in range(model.num_layers):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
            try:
                mechanism = attention_class(config, head_dim=head_dim, kernel=kernel, generator=generator)
            except ValueError as error:
                raise UserError(f"attention.{attn}: {error}") from None
            try:
                heads = SelfAttention(
                    mechanism, width=model.width, num_heads=model.num_heads, former=former, config=former_config
                )
            except ValueError as error:
                raise UserError(f"former.{former}: {error}") from None
            blocks.append(Block(heads, model))
        encoder = Encoder(blocks, vocab_size=vocab_size, max_length=max_length, config=model)
        return Classifier(encoder, num_texts=num_texts, num_classes=num_classes, config=model)


def _kernel_for(attn: str, dotf: str | None, former: str) -> Kernel | None:
    if former not in FORMERS:
        raise unknown_name("former", former, list(FORMERS))
    check_kernel(attn, dotf)
    if dotf is None:
        return None
    kernel = KERNELS.get(dotf)()
    if former == "transformer" and kernel.radius < float("inf"):
        raise UserError(
            f"dotf {dotf!r} is defined for |x| < {kernel.radius:g} only, and former 'transformer' does not bound its "
            f"argument; use former 'maclauformer'"
        )
    return kernel
