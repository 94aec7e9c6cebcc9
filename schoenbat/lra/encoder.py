"""The model: a small encoder, and a classifier of one or two texts or of each position of a text.

By default the set-up is that of Skyformer (NeurIPS 2021), which SchoenbAt's experiments use: pre-norm blocks, learned
positions, masked mean pooling.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from schoenbat.attention import ATTENTIONS, check_kernel, check_length
from schoenbat.errors import UserError, unknown_name
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.lra.config import build_config
from schoenbat.lra.dropout import Dropout
from schoenbat.lra.multihead import FORMERS, FormerConfig, SelfAttention
from schoenbat.registry import base_name, check_bounds

POSITION_STEP = 64
"""The table of positions is rounded up to a multiple of this, as batches are padded to one."""
EMBEDDING_STD = 0.02

MAX_LAYERS, MAX_WIDTH, MAX_CONVOLUTION = 1000, 2**16, 64


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the encoder, and what papers do in different ways.

    Attributes:
        num_layers: blocks of attention and MLP.
        width: of a token's vector, a multiple of `num_heads`.
        ffn_width: the hidden layer of the MLP of a block.
        num_heads: of attention.
        dropout: the share of units dropped in training, of the outputs of attention and MLP and inside the MLP.
        head_width: the hidden layer of the classifier.
        pooling: of a text to one vector: the mean over its tokens, or what a learned token before them (cls) becomes.
            Without meaning where each position is classified; there it must be mean, the default.
        norm: LayerNorm before attention and MLP, and once at the end (pre); or after each sum (post), as in the first
            Transformer.
        positions: learned vectors; sines and cosines; or none.
        convolution: so many tokens, a token itself and those before it, are mixed channel by channel and added to the
            token before the first block (as in H3, Zoology, Based and Mamba); 0 for none. A token then knows its
            predecessor without attention.
    """

    num_layers: int = 2
    width: int = 64
    ffn_width: int = 128
    num_heads: int = 2
    dropout: float = 0.1
    head_width: int = 128
    pooling: Literal["mean", "cls"] = "mean"
    norm: Literal["pre", "post"] = "pre"
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    convolution: int = 0

    def __post_init__(self) -> None:
        wide = (1, MAX_WIDTH)
        check_bounds(self, num_layers=(1, MAX_LAYERS), width=wide, ffn_width=wide, num_heads=wide, head_width=wide)
        check_bounds(self, convolution=(0, MAX_CONVOLUTION))
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} cannot be split over {self.num_heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or, post-norm, norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, attention: SelfAttention, config: ModelConfig) -> None:
        super().__init__()
        self.norm_first = config.norm == "pre"
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.ffn_width),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(config.ffn_width, config.width),
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), key_mask))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, key_mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class ShortConvolution(nn.Module):
    """x[t] + sum_i w_i * x[t - i] over i < size, w_i a learned weight per channel: [B, N, width] to the same.

    Masked tokens count as 0.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width).uniform_(-1, 1) * size**-0.5)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        there = x.masked_fill(~key_mask[..., None], 0.0)
        mixed = x
        for i, weight in enumerate(self.weight.to(x.dtype)):
            mixed = mixed + weight * nn.functional.pad(there, (0, 0, i, 0))[..., : x.shape[-2], :]
        return mixed


class Encoder(nn.Module):
    """Tokens [B, N] and key_mask [B, N] to one vector per text, [B, width], or per position, [B, N, width]."""

    def __init__(
        self, blocks: list[Block], *, vocab_size: int, max_length: int, per_position: bool, config: ModelConfig
    ) -> None:
        super().__init__()
        self.per_position = per_position
        self.tokens = nn.Embedding(vocab_size, config.width)
        nn.init.normal_(self.tokens.weight, std=EMBEDDING_STD)
        length = -(-max_length // POSITION_STEP) * POSITION_STEP
        self.positions: Tensor | None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(length, config.width))
            nn.init.normal_(self.positions, std=EMBEDDING_STD)
        else:
            fixed = sinusoidal_positions(length, config.width) if config.positions == "sinusoidal" else None
            self.register_buffer("positions", fixed, persistent=False)
        self.convolution = ShortConvolution(config.convolution, config.width) if config.convolution else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.cls = nn.Parameter(torch.randn(config.width) * EMBEDDING_STD) if config.pooling == "cls" else None

    def forward(self, tokens: Tensor, key_mask: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[-1]]
        if self.convolution is not None:
            x = self.convolution(x, key_mask)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=-2)
            key_mask = nn.functional.pad(key_mask, (1, 0), value=True)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, key_mask)
        x = self.norm(x)
        if self.per_position:
            return x
        # Under autocast, sums over thousands of tokens.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.cls is not None:
            return x[:, 0]
        weights = key_mask[..., None].to(x.dtype)
        return (x * weights).sum(-2) / weights.sum(-2).clamp_min(1)


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Make sines and cosines of the position, [length, width], of wavelengths 2 pi to 20,000 pi (Vaswani et al. 2017).

    Scaled to the standard deviation that token embeddings begin with; at their full size the tokens would drown.
    """
    column = torch.arange(width)
    rate = 10_000.0 ** (-2 * (column // 2) / width)
    angle = torch.arange(length)[:, None] * rate
    return torch.where(column % 2 == 0, torch.sin(angle), torch.cos(angle)) * (math.sqrt(2) * EMBEDDING_STD)


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
        """Compute logits [B, num_classes] for tokens and key_mask [B, num_texts, N]; by default token 0 is padding.

        [B, N, num_classes] where each position is classified.
        """
        batch, num_texts, _ = tokens.shape
        if key_mask is None:
            key_mask = tokens != 0
        encoded = self.encoder(tokens.flatten(0, 1), key_mask.flatten(0, 1)).unflatten(0, (batch, num_texts))
        if num_texts == 1:
            return self.head(encoded[:, 0])
        a, b = encoded[:, 0], encoded[:, 1]
        return self.head(torch.cat([a, b, a * b, a - b], dim=-1))

    def state_bytes(self, length: int) -> int:
        """Return the size in bytes of the causal state over `length` tokens: of all heads of all layers."""
        layers = [module for module in self.modules() if isinstance(module, SelfAttention)]
        return sum(
            layer.num_heads
            * layer.attention.state_bytes(length=length, head_dim=layer.project_out.in_features // layer.num_heads)
            for layer in layers
        )


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
    per_position: bool = False,
    causal: bool = False,
) -> Classifier:
    """Build a model whose weights and random features are a pure function of the arguments.

    Args:
        attn: name of the attention mechanism or of a variant; `attention` is its section of options, built strictly.
        dotf: name of the kernel, for the mechanisms that need one.
        former: "maclauformer" or "transformer", or a variant.
        per_position, causal: what the task says, see `schoenbat.lra.tasks.Task`.

    Raises:
        UserError: an unknown name or option, a kernel missing or superfluous, one that the former cannot keep inside
            its radius of convergence, a mechanism that cannot be causal, or a pooling that the task has no use for.
    """
    if model.pooling == "cls" and (per_position or causal):
        raise UserError(
            "pooling 'cls' needs a task that classifies whole texts and is not causal; leave it at 'mean' here"
        )
    attention_class = ATTENTIONS.get(attn)
    if causal and not attention_class.has_causal_form:
        raise UserError(f"attn {attn!r} has no causal form, which this task needs: a token would learn of later ones")
    config: Any = build_config(attention_class.Config, attention, f"attention.{attn}")
    former_base = base_name(former)
    kernel = _kernel_for(attn, dotf, former_base)
    for option in fields(FormerConfig):
        if getattr(former_config, option.name) != option.default and former_base != "maclauformer":
            raise UserError(f"former {former!r} has no SBN, so it takes no option {option.name!r}")
    check_length(attn, attention_class, config, max_length + (model.pooling == "cls"))
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
                    mechanism,
                    width=model.width,
                    num_heads=model.num_heads,
                    former=former_base,
                    config=former_config,
                    causal=causal,
                )
            except ValueError as error:
                raise UserError(f"former.{former}: {error}") from None
            blocks.append(Block(heads, model))
        encoder = Encoder(blocks, vocab_size=vocab_size, max_length=max_length, per_position=per_position, config=model)
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
