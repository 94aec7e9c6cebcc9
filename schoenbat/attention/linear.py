"""Linear attention through elu(x) + 1."""

from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import Attention, sums_bytes
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Linear(Attention):
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1), phi(x) = elu(x) + 1 on unscaled q and k (arXiv 2006.16236, Eqs. 4-7).

    It approximates nothing. The form without a denominator, divided by sqrt(n), and the one with softmax over features
    and over positions, which go by similar names, are other mechanisms.

    Time n d^2 and memory n d of a head.
    """

    cost = "linear"
    paper = "Katharopoulos et al., ICML 2020, arXiv 2006.16236"

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(head_dim, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = causal_linear_attention if is_causal else linear_attention
        return attention(F.elu(q) + 1, F.elu(k) + 1, v, key_mask)
