"""Calibration on the GPU finds what it finds on the CPU, and its result stays there."""

import pytest
import torch
from gpu_device import DEVICE

from schoenbat import Estimate, MultiheadKernelAttention, calibrate, calibrate_tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_basis_is_as_good_as_on_the_cpu(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 256, 32, generator=generator) * torch.arange(1, 33) ** -0.5
    mask = torch.arange(256) < torch.tensor([256, 200])[:, None]
    found = []
    for device in (torch.device("cpu"), DEVICE):
        tensors = [x.to(device) for x in (query, key, value, mask)]
        fitted = calibrate_tensors(*tensors, is_causal=is_causal, estimate=Estimate(num_features=64))
        out = fitted(*tensors, is_causal=is_causal)
        assert out.device == device
        found.append((fitted.before, fitted.after, fitted.max_degree))
    assert found[0] == (pytest.approx(found[1][0], abs=1e-3), pytest.approx(found[1][1], abs=1e-3), found[1][2])


def test_a_calibrated_model_stays_on_its_device() -> None:
    torch.manual_seed(0)
    layer = MultiheadKernelAttention(32, 2, num_features=16, batch_first=True).to(DEVICE)
    x = 4 * torch.randn(4, 192, 32).to(DEVICE) / torch.arange(1, 33, device=DEVICE)
    (done,) = calibrate(layer, x, x, x)
    assert done.max_degree is not None
    assert {y.device for y in (*layer.parameters(), *layer.buffers(), layer(x, x, x)[0])} == {x.device}
