"""One estimate of dot-product-kernel attention: what is computed, checked and drawn in one place.

The functional form, `schoenbat.nn.MultiheadKernelAttention` and the integration with transformers are ways to say an
`Estimate`; what they compute is `Estimate.attend`.
"""

import functools
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from schoenbat.errors import UserError, shorten, unknown_name
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.plan import FeatureMap
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.norm import pre_sbn
from schoenbat.ops import sparse
from schoenbat.ops._share import POOR, PoorEstimateWarning, compare_exactly
from schoenbat.ops.exact import exact_attention
from schoenbat.ops.linear import attend
from schoenbat.ops.reference import AttentionInputs, tame_masked
from schoenbat.ops.sparse import HeadKernels, Sparsity

ESTIMATORS = ("sketch", "maclaurin")
_LEAST = {"num_features": 1, "max_degree": 1, "seed": 0, "window": 0, "heavy": 0, "sinks": 0}
Watcher = Callable[["Estimate", AttentionInputs, FeatureMap | None], None]
WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
"""Called with what each estimate computes attention from; the features are None where it is exact."""
_COMPARED: ContextVar[frozenset["Estimate"]] = ContextVar("compared", default=frozenset())
"""The estimates of which a first output was compared with exact attention."""


@dataclass(frozen=True)
class Estimate:
    """sum_j f(scale <q_i, k_j>) v_j / sum_j f(scale <q_i, k_j>), exact or through features.

    Attributes:
        kernel: f, by name or itself.
        num_features: the budget D, at least 1; None evaluates f exactly, in quadratic time.
        estimator: "sketch", the features of least expected error (`schoenbat.features.sketch`), whose output is kept
            from being further off than that of uniform weights; or "maclaurin", random Maclaurin features as published
            (`schoenbat.features.maclaurin`), which are not.
        seed: of the draw. The same settings give the same draw in every process, on every device.
        normalize: put query and key of each head through pre-SBN; needed by a kernel that is not defined everywhere.
        max_degree: the highest degree that gets features.
        window: tokens of a block; a query sees the keys of its own block and of those beside it exactly. 0 for none.
        heavy: the number of keys of each head, those with the largest weights, that every query sees exactly.
        sinks: the number of first tokens that stay exact in causal attention, where there is a window. With a window or
            heavy keys (`schoenbat.ops.sparse`) features describe only the other keys, up to the second degree.
        function: f itself.

    Raises:
        UserError: an unknown name, a size that is too small, a kernel that is not defined for all arguments that may
            come, or a window or heavy keys with another kernel than exp or without the features of the sketch.
    """

    kernel: str | Kernel = "exp"
    num_features: int | None = 256
    estimator: str = "sketch"
    seed: int = 0
    normalize: bool = False
    max_degree: int = 20
    window: int = 0
    heavy: int = 0
    sinks: int = 4
    function: Kernel = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, str | Kernel):
            raise UserError(f"kernel must be a name or a Kernel, not {self.kernel!r}; see Kernel.from_callable")
        if self.estimator not in ESTIMATORS:
            raise unknown_name("estimator", self.estimator, list(ESTIMATORS))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if name == "num_features" and value is None:
                continue
            if not isinstance(value, Integral):
                raise UserError(f"{name} must be an integer, not {value!r}")
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        # Looked up here, as torch.compile cannot follow a look-up.
        function = self.kernel if isinstance(self.kernel, Kernel) else _kernel_named(self.kernel)
        object.__setattr__(self, "function", function)
        if self.sparsity is None:
            return
        if not function.is_exponential:
            raise UserError(f"window and heavy are for the kernel exp, not for {type(function).__name__}")
        if self.num_features is None or self.estimator != "sketch":
            raise UserError("window and heavy leave other keys to features of the estimator sketch; set num_features")

    @property
    def sparsity(self) -> Sparsity | None:
        """The keys that are seen exactly; None where all go through features, or all are exact."""
        return Sparsity(self.window, self.heavy, self.sinks) if self.window or self.heavy else None

    def check_defined(self, scale: float) -> None:
        """Raise UserError unless f is defined for scale <q, k> whatever q and k are."""
        radius, name = self.function.radius, type(self.function).__name__
        if math.isinf(radius):
            return
        if not self.normalize:
            raise UserError(f"kernel {name} is defined for arguments below {radius:g} only; set normalize=True")
        if abs(scale) >= radius:
            raise UserError(
                f"kernel {name} is defined for arguments below {radius:g} only, and a scale of {scale:.3g} lets them "
                f"reach {abs(scale):.3g}"
            )

    def make(self, head_dim: int, scale: float | None = None, generator: torch.Generator | None = None) -> FeatureMap:
        """Draw a new feature map for vectors with head_dim coordinates whose dot products get the factor `scale`.

        Args:
            scale: 1 / sqrt(head_dim) where it is None.
            generator: the source of the draw; one with `seed` where it is None.
        """
        assert self.num_features is not None
        scale = head_dim**-0.5 if scale is None else abs(scale)
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        # On the CPU whatever torch's default device is, so that all devices get the same draw.
        with torch.device("cpu"):
            return self._make(head_dim, scale, generator)

    def _make(self, head_dim: int, scale: float, generator: torch.Generator) -> FeatureMap:
        assert self.num_features is not None
        kernel = self.function
        sizes = {"head_dim": head_dim, "num_features": self.num_features, "max_degree": self.max_degree}
        if self.sparsity is not None:
            if self.num_features <= head_dim:
                raise UserError(
                    f"with a window or heavy keys num_features must be above head_dim ({head_dim}), not "
                    f"{self.num_features}: the first degree is described completely"
                )
            sizes["max_degree"] = min(2, self.max_degree)
        if self.estimator == "maclaurin":
            return RandomMaclaurin(kernel, **sizes, generator=generator)
        # exp is centred, after which vectors have any length. Vectors as they come have any length too: the scale of
        # the allocation then says which degrees matter, and up to 4,096 features the lowest ones do.
        fixed = self.normalize and not kernel.is_exponential
        expected = scale if self.normalize else min(1.0, kernel.radius / 2)
        bounded = not self.normalize or varies_much(kernel, scale)
        return Sketch(kernel, **sizes, scale=expected, fixed_norm=fixed, bounded=bounded, generator=generator)

    def draw(self, head_dim: int, scale: float | None = None, device: torch.device | None = None) -> FeatureMap:
        """Return the feature map that these settings stand for, on `device`; it is kept for further calls."""
        scale = head_dim**-0.5 if scale is None else abs(scale)
        # Drawing is no part of a compiled graph: a first call inside torch.compile breaks the graph here.
        return torch.compiler.disable(_draw)(self, head_dim, scale, device or torch.device("cpu"))

    def prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        scale: float | Tensor | None = None,
        self_attention: bool = False,
    ) -> AttentionInputs:
        """Normalise query and key if these settings say so, and make the scale positive; arguments as for `attend`.

        Raises:
            UserError: dot products beyond the radius of convergence of f, or for which it overflows, a scale that is no
                finite number, a mask of another shape than that of keys, heavy keys without a window in causal
                attention, or DTensors.
        """
        if any(type(x).__name__ == "DTensor" for x in (query, key, value)):
            raise UserError("a DTensor is not supported; give its local tensors, as by DTensor.to_local()")
        expected = (key.shape[0], key.shape[2])
        if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected):
            raise UserError(f"key_mask must be bool {list(expected)}, not {key_mask.dtype} {list(key_mask.shape)}")
        if is_causal and self.heavy and not self.window:
            raise UserError("causal attention with heavy keys needs a window: heavy keys are those that left it")
        query = tame_masked(query, key_mask)
        default = query.shape[-1] ** -0.5
        factor: float = default if scale is None or isinstance(scale, Tensor) else scale
        if not (isinstance(factor, int | float) and math.isfinite(factor)):
            raise UserError(f"scale must be a finite number or a tensor, not {shorten(scale)}")
        if self.normalize:
            self.check_defined(factor)
            query, key = pre_sbn(query), pre_sbn(key)
        if isinstance(scale, Tensor):
            query = query * (self._of_heads(scale, query.shape[1]) / default).to(query.dtype)
        if not self.normalize:
            self._check_arguments(query, key, factor, key_mask, self_attention or is_causal)
        signed = -query if factor < 0 else query
        return AttentionInputs(signed, key, value, key_mask, is_causal, abs(factor), self_attention)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        scale: float | Tensor | None = None,
        features: FeatureMap | None = None,
        block: int | None = None,
        self_attention: bool = False,
        kernels: HeadKernels | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: [B, H, N, d], [B, Hk, M, d], [B, Hk, M, v]; H is a multiple of Hk, and consecutive H / Hk
                query heads share a key head.
            key_mask: bool [B, M], True = attend. What stands at masked places does not matter, be it NaN.
            is_causal: query i sees keys up to i; requires N = M.
            scale: 1 / sqrt(d) where it is None; a tensor of one number, or of one for each of the H heads, may be
                learned.
            features: from `make`; the draw of `seed` where it is None.
            block, self_attention: see `schoenbat.ops.linear.attend`.
            kernels: of the heads, for keys that are neither near nor heavy; None for exp.

        Returns:
            [B, H, N, v] in the dtype of `query`; 0 for a query that may attend to nothing.

        Raises:
            UserError: see `prepare`.
        """
        inputs = self.prepare(query, key, value, key_mask, is_causal, scale=scale, self_attention=self_attention)
        if features is None and self.num_features is not None:
            features = self.draw(query.shape[-1], inputs.scale, query.device)
        out = self.compute(inputs, features, block=block, kernels=kernels)
        self.observe(out, inputs, features)
        return out

    def compute(
        self,
        inputs: AttentionInputs,
        features: FeatureMap | None,
        *,
        block: int | None = None,
        kernels: HeadKernels | None = None,
    ) -> Tensor:
        """Attend to what `prepare` returned, unobserved, exactly where there are no features."""
        if features is None:
            return self._exact(inputs)
        if self.sparsity is not None:
            return sparse.attend(features, inputs, self.sparsity, kernels)
        return attend(features, *inputs, block=block)

    def observe(self, out: Tensor, inputs: AttentionInputs, features: FeatureMap | None) -> None:
        """Show `inputs` to `WATCHER`, and warn once if `out` explains less than half of this attention."""
        if torch.compiler.is_compiling():
            return
        if (watcher := WATCHER.get()) is not None:
            watcher(self, inputs, features)
        if features is None or self in _COMPARED.get():
            return
        _COMPARED.set(_COMPARED.get() | {self})
        with torch.no_grad():
            exact = compare_exactly(self.function, inputs)
            try:
                (share,) = exact.share_explained(out, dim=(0, 1, 2, 3), keepdim=True)
            except RuntimeError:
                # Under vmap tensors have no values to look at.
                return
        if share < POOR:
            part = f"{share:.0%}" if share > 0 else "nothing"
            warnings.warn(
                f"{self.num_features} features explain {part} of the attention of this batch; "
                "schoenbat.diagnose says what would. Switch this off by "
                "warnings.simplefilter('ignore', schoenbat.PoorEstimateWarning)",
                PoorEstimateWarning,
                stacklevel=3,
            )

    def _of_heads(self, scale: Tensor, heads: int) -> Tensor:
        """Return a scale that is a tensor in the shape [H, 1, 1], or [1, 1, 1] for all heads."""
        if scale.numel() not in (1, heads):
            raise UserError(
                f"scale must be one number, or one for each of the {heads} heads of query, not {list(scale.shape)}"
            )
        if self.normalize and not self.function.is_exponential:
            raise UserError("with normalize=True scale may be a tensor for the kernel exp only; give a number")
        return scale.reshape(-1, 1, 1)

    def _exact(self, inputs: AttentionInputs) -> Tensor:
        query, key, value, key_mask, is_causal, scale, _ = inputs
        wide = torch.promote_types(query.dtype, torch.float32)
        root = math.sqrt(scale)
        # Autocast would round the scores after they were checked against the radius.
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = query.to(wide) * root, key.to(wide) * root, value.to(wide)
            return exact_attention(q, k, v, self.function, key_mask, is_causal).to(query.dtype)

    def _check_arguments(
        self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None, self_attention: bool
    ) -> None:
        kernel = self.function
        limit = kernel.largest_argument
        if math.isinf(limit) or not (query.numel() and key.numel()):
            return
        if math.isinf(kernel.radius) and torch.compiler.is_compiling():
            return
        lengths = [x.detach().float().norm(dim=-1) for x in (query, key)]
        if key_mask is not None:
            lengths[1] = lengths[1].masked_fill(~key_mask[:, None], 0.0)
            if self_attention:
                lengths[0] = lengths[0].masked_fill(~key_mask[:, None], 0.0)
        try:
            largest = abs(scale) * float(lengths[0].amax()) * float(lengths[1].amax())
        except RuntimeError:
            # Under vmap tensors have no values to look at.
            if math.isinf(kernel.radius):
                return
            raise
        name = type(kernel).__name__
        if math.isinf(kernel.radius) and largest > limit:
            raise UserError(
                f"kernel {name} leaves the range of floating-point numbers for arguments above {limit:.3g}; "
                f"scale |query| |key| reaches {largest:.3g} here. Lower scale, or set normalize=True"
            )
        if not math.isinf(kernel.radius) and not largest < limit:
            raise UserError(
                f"kernel {name} is defined for arguments below {limit:g}; scale |query| |key| reaches {largest:.3g} "
                "here. Put query and key through schoenbat.norm.pre_sbn, or lower scale"
            )


def varies_much(kernel: Kernel, largest: float) -> bool:
    """Return whether f falls below f(0) / 2 for arguments up to `largest`: only then are denominators ever near 0."""
    points = torch.linspace(-largest, largest, 65, dtype=torch.float64)
    return bool(kernel(points).min() < kernel(torch.zeros((), dtype=torch.float64)) / 2)


@functools.cache
def _kernel_named(name: str) -> Kernel:
    """Make one instance per name, so that draws made for it are found again."""
    if name not in KERNELS.names():
        raise unknown_name("kernel", name, KERNELS.names())
    return KERNELS.get(name)()


@functools.lru_cache(maxsize=64)
def _draw(estimate: Estimate, head_dim: int, scale: float, device: torch.device) -> FeatureMap:
    if torch.compiler.is_exporting():
        # Tensors that an export makes have no values. Its modes are those of this thread alone.
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(lambda: estimate.make(head_dim, scale).to(device)).result()
    # A tensor made in inference mode could never take part in training.
    with torch.inference_mode(False):
        return estimate.make(head_dim, scale).to(device)
