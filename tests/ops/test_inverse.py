"""The iterated inverse."""

import torch

from schoenbat.ops.inverse import iterated_inverse


def test_it_approaches_the_inverse_with_its_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(3, 2, 10, 10, generator=generator, dtype=torch.float64) + 5 * torch.eye(10)
    matrix = matrix / matrix.sum(-1, keepdim=True)
    errors = [float((iterated_inverse(matrix, steps) @ matrix - torch.eye(10)).norm()) for steps in (1, 2, 3, 8)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12


def test_matrices_of_a_batch_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64)
    matrix[1] *= 100
    alone = torch.stack([iterated_inverse(x) for x in matrix])
    torch.testing.assert_close(iterated_inverse(matrix), alone, rtol=1e-12, atol=0)
