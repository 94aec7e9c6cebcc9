"""x^2, the kernel of power attention of the second degree."""

from torch import Tensor

from schoenbat.kernels import Kernel


class Power2(Kernel):
    r"""f(x) = x^2, a_2 = 1 and all others 0, for every x.

    The weights <q, k>^2 are those of power attention at degree 2 (Buckman, Gelada & Zhang 2024, "Symmetric power
    transformers"). They are exactly <phi(q), phi(k)> with phi(x) = x x^T flattened, so d (d + 1) / 2 features say all.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x * x

    def coefficient(self, degree: int) -> float:
        return 1.0 if degree == 2 else 0.0
