"""x^2, the kernel of power attention of the second degree."""

from torch import Tensor

from schoenbat.kernels import Kernel


class Power2(Kernel):
    r"""f(x) = x^2, a_2 = 1 and all others 0, for every x.

    The weights <q, k>^2 are those of power attention of degree 2 (Gelada, Buckman, Zhang & Bach 2025, arXiv
    2507.04239). x x^T flattened is a feature map without error, so that d (d + 1) / 2 features say all.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x * x

    def coefficient(self, degree: int) -> float:
        return 1.0 if degree == 2 else 0.0
