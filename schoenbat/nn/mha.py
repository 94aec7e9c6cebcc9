"""Linear-time attention in the shape of torch.nn.MultiheadAttention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schoenbat.errors import UserError
from schoenbat.estimate import Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.functional import check_shapes
from schoenbat.kernels import Kernel
from schoenbat.ops.sparse import HeadKernels


class MultiheadKernelAttention(nn.Module):
    """Projections around dot-product-kernel attention, with arguments and parameter names of nn.MultiheadAttention.

    A state_dict of nn.MultiheadAttention loads strictly: what it lacks, the draw of the features, stays as it is. It
    can stand as `self_attn` of nn.TransformerEncoderLayer and nn.TransformerDecoderLayer.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as there.
        dropout: must be 0; there it drops attention weights, which do not exist here.
        add_bias_kv, add_zero_attn: must be False.
        kernel, num_features, estimator, seed, normalize, max_degree, window, heavy, sinks: see `schoenbat.Estimate`.

    Attributes:
        head_kernels: those that `schoenbat.transfer` fitted, if any.

    The draw is made at once even on the meta device; `reset_parameters` draws it again, as needed after `to_empty`.
    """

    # torch's encoder layers look at this attribute and go around the module by a fused softmax if it is True.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel: str | Kernel = "exp",
        num_features: int | None = 256,
        estimator: str = "sketch",
        seed: int = 0,
        normalize: bool = False,
        max_degree: int = 20,
        window: int = 0,
        heavy: int = 0,
        sinks: int = 4,
    ) -> None:
        super().__init__()
        if dropout != 0:
            raise UserError(f"dropout must be 0, not {dropout}: linear attention has no weights to drop")
        if add_bias_kv or add_zero_attn:
            raise UserError("add_bias_kv and add_zero_attn are not supported; leave them False")
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise UserError(f"embed_dim must be a multiple of num_heads, not {embed_dim} of {num_heads}")
        self.estimate = Estimate(kernel, num_features, estimator, seed, normalize, max_degree, window, heavy, sinks)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.estimate.check_defined(self.head_dim**-0.5)
        place = {"device": device, "dtype": dtype}
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **place))  # type: ignore[arg-type]
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            for name, width in (("q", embed_dim), ("k", self.kdim), ("v", self.vdim)):
                weight = nn.Parameter(torch.empty(embed_dim, width, **place))  # type: ignore[arg-type]
                self.register_parameter(f"{name}_proj_weight", weight)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **place))  # type: ignore[arg-type]
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **place)
        self.head_kernels: HeadKernels | None = None
        self.features: FeatureMap | None = None
        if num_features is not None:
            self.features = self.estimate.make(self.head_dim)
            if device is not None and torch.device(device).type != "meta":
                self.features.to(device)
        self.register_load_state_dict_pre_hook(_keep_own_draw)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.MultiheadAttention does (Xavier in, zero biases), and draw the same features again."""
        if self.features is not None:
            self.features.reset_parameters()
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            weight = getattr(self, name)
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """Return sizes and settings."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, {self.estimate}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        self_attention: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query, key, value: [L, B, embed_dim], [S, B, kdim], [S, B, vdim]; batch before length with `batch_first`;
                or without a batch.
            key_padding_mask: [B, S], or [S] without a batch; True = MASKED, as in torch and opposite to the rest of
                this library. A float mask may hold 0 and -inf.
            need_weights, average_attn_weights: no weights exist; the first must be False.
            attn_mask: only the causal mask, bool or float. With `is_causal` it is not looked at.
            is_causal: query i sees keys up to i.
            self_attention: the queries are the tokens of the keys, and the estimate may use all of them (see
                `schoenbat.ops.linear.attend`), which is of less error; None for whether query and key are the same
                object, which a slice or a cast of one of them is not.

        Returns:
            The output in the shape of `query`, and None.
        """
        if need_weights:
            raise UserError("need_weights must be False: linear attention has no weights to return")
        if query.is_nested:
            raise UserError(
                "nested tensors are not supported; build nn.TransformerEncoder with enable_nested_tensor=False, or set "
                "its use_nested_tensor to False"
            )
        if attn_mask is not None and not is_causal:
            _check_causal(attn_mask, query, key, self.batch_first)
            is_causal = True
        self_attention = query is key if self_attention is None else self_attention
        has_batch = query.ndim == 3
        batch_dim = 0 if self.batch_first or not has_batch else 1
        if not has_batch:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif batch_dim == 1:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        key_mask = None if key_padding_mask is None else _attended(key_padding_mask)

        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._project(query, key, value))
        check_shapes(q, k, v)
        out = self.estimate.attend(
            q,
            k,
            v,
            key_mask,
            is_causal,
            features=self.features,
            self_attention=self_attention,
            kernels=self.head_kernels,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        if not has_batch:
            return out.squeeze(0), None
        return (out.transpose(0, 1) if batch_dim == 1 else out), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _attended(key_padding_mask: Tensor) -> Tensor:
    """Convert torch's convention to True = attend."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    if key_padding_mask.is_floating_point():
        kept = key_padding_mask == 0
        # Inside torch.compile values cannot be looked at without a graph break.
        if torch.compiler.is_compiling() or (kept | key_padding_mask.isneginf()).all():
            return kept
    raise UserError("key_padding_mask must be bool, True = masked, or float of 0 and -inf only")


def _check_causal(attn_mask: Tensor, query: Tensor, key: Tensor, batch_first: bool) -> None:
    length_dim = 1 if batch_first and query.ndim == 3 else 0
    shape = (query.shape[length_dim], key.shape[length_dim])
    future = torch.ones(shape, dtype=torch.bool, device=attn_mask.device).triu(1)
    if attn_mask.dtype != torch.bool:
        future = torch.zeros(shape, dtype=attn_mask.dtype, device=attn_mask.device).masked_fill(future, -math.inf)
    if not torch.equal(attn_mask, future):
        raise UserError(
            f"attn_mask must be the causal mask of {shape[0]} by {shape[1]} tokens: any other mask of pairs has no "
            "meaning in linear time"
        )


def _keep_own_draw(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Add the draw of the settings to weights that were saved without features, by nn.MultiheadAttention."""
    assert isinstance(module, MultiheadKernelAttention)
    own = prefix + "features."
    if module.features is not None and not any(name.startswith(own) for name in state_dict):
        module.features.reset_parameters()
        state_dict.update(module.features.state_dict(prefix=own))
