"""x^2 / (C - 2 x), the spherical Yat kernel."""

from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.kernels import Kernel


class Yat(Kernel):
    r"""f(x) = x^2 / (C - 2 x) with C = 2 + epsilon, for abs(x) < C / 2.

    The Yat kernel is <q, k>^2 / (|q - k|^2 + epsilon). On unit vectors |q - k|^2 = 2 - 2 <q, k>, which leaves a
    function of the dot product alone (SLAY, arXiv 2602.04915). Its geometric series

        x^2 / (C - 2 x) = (x^2 / C) sum_m (2 x / C)^m

    gives a_0 = a_1 = 0 and a_n = 2^(n - 2) / C^(n - 1).

    Args:
        epsilon: positive; the kernel peaks at f(1) = 1 / epsilon. The paper leaves it open, and its authors' programs
            take 1e-6 to 1e-2. With 0.1 the arguments of unit vectors end at 0.95 of the radius of convergence.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        if not epsilon > 0:
            raise UserError(f"epsilon of the Yat kernel must be positive, not {epsilon}")
        self.c = 2 + epsilon
        self.radius = self.c / 2

    def __call__(self, x: Tensor) -> Tensor:
        return x * x / (self.c - 2 * x)

    def coefficient(self, degree: int) -> float:
        return (2 / self.c) ** (degree - 2) / self.c if degree >= 2 else 0.0
