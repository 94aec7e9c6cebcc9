"""1 / (1 - x): all coefficients are 1."""

from torch import Tensor

from schoenbat.kernels import Kernel


class Inverse(Kernel):
    r"""f(x) = 1 / (1 - x), a_n = 1, for abs(x) < 1."""

    radius = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return 1 / (1 - x)

    def coefficient(self, degree: int) -> float:
        return 1.0
