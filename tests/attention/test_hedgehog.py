"""Hedgehog's feature map against its formula, written the slow way."""

import pytest
import torch
from heads import build, normal, normalised, ragged


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_the_quadratic_form(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 90, 6)
    mask = ragged([90, 40], 90)
    attention = build("hedgehog", 6)
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    features = []
    for x, weight, bias in (
        (query, attention.query_weight, attention.query_bias),
        (key, attention.key_weight, attention.key_bias),
    ):
        mapped = torch.einsum("...i,oi->...o", x, weight) + bias
        both = torch.cat([(2 * mapped).exp(), (-2 * mapped).exp()], -1)
        features.append(both / both.sum(-1, keepdim=True))
    weights = torch.einsum("bhif,bhjf->bhij", *features)
    expected = normalised(weights, value, mask, is_causal)
    torch.testing.assert_close(attention(query, key, value, mask, is_causal), expected, rtol=1e-8, atol=1e-10)


def test_its_maps_are_the_identity_at_first() -> None:
    query, key, value = normal(1, 1, 20, 6)
    features = [torch.cat([2 * x, -2 * x], -1).softmax(-1) for x in (query, key)]
    torch.testing.assert_close(build("hedgehog", 6)(query, key, value), normalised(features[0] @ features[1].mT, value))
