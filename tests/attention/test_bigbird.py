"""Block sparse attention against a dense mask and against transformers'."""

import numpy as np
import pytest
import torch
from heads import build, normal, ragged, relative_error
from torch import Tensor
from torch.nn import functional as F


def mask_of(chosen: Tensor, used: Tensor, number: int, size: int, padded: int) -> Tensor:
    """bool [N, N]: the blocks in `chosen` [n, slots], and all for the first block and the last of `number` blocks."""
    pairs = torch.zeros(len(chosen), len(chosen), dtype=torch.bool)
    for row, (blocks, there) in enumerate(zip(chosen, used, strict=True)):
        named = blocks[there].tolist()
        assert len(set(named)) == len(named), "a block was named twice"
        pairs[row, named] = True
    pairs[0], pairs[number - 1] = True, True
    return pairs.repeat_interleave(size, 0).repeat_interleave(size, 1)[:padded, :padded]


@pytest.mark.parametrize(("length", "padded"), [(60, 60), (58, 58), (37, 60), (9, 60), (4, 60), (1, 60)])
def test_it_is_softmax_attention_under_its_block_mask(length: int, padded: int) -> None:
    size = 4
    query, key, value = normal(1, 2, padded, 8)
    mask = ragged([length], padded)
    attention = build("bigbird", 8, block_size=size, num_random_blocks=2)
    filled = F.pad(mask, (0, -padded % size)).unflatten(-1, (-1, size)).any(-1)
    number = int(filled.sum())
    chosen, used = (x[0] for x in attention.blocks(filled))
    index = torch.arange(number)
    others = used[:number, 5:].sum(-1)
    assert (chosen[used] < number).all()
    # All of the others where there are no more than two.
    free = torch.tensor([sum(abs(i - j) > 1 and 0 < j < number - 1 for j in range(number)) for i in index])
    assert torch.equal(others, free.clamp_max(2))
    allowed = mask_of(chosen, used, number, size, padded) & mask[0]
    found = attention(query, key, value, mask)[0, :, :length]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)[0, :, :length]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_every_free_block_is_as_likely() -> None:
    # 1,000 draws of 2 among 9 blocks for row 5 of 14: 5 standard errors, a false-alarm rate below 1e-5.
    counts = torch.zeros(14)
    for seed in range(1000):
        chosen, _ = build("bigbird", 2, seed, num_random_blocks=2).blocks(torch.ones(1, 14, dtype=torch.bool))
        counts[chosen[0, 5, 5:]] += 1
    free = [1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert counts.sum() == counts[free].sum() == 2000
    expected = 2000 / 9
    assert ((counts[free] - expected).abs() < 5 * (expected * (1 - 2 / 9)) ** 0.5).all()


def test_it_is_transformers_bigbird_with_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(
        "transformers.models.big_bird.modeling_big_bird", reason="transformers (extra oracles) is not installed"
    )
    size, length = 4, 60
    config = module.BigBirdConfig(
        hidden_size=8,
        num_attention_heads=1,
        block_size=size,
        num_random_blocks=1,
        max_position_embeddings=length,
        attention_probs_dropout_prob=0.0,
    )
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oracle = module.BigBirdBlockSparseAttention(config, seed=3).double().train()
        hidden = 3 * torch.randn(2, length, 8, dtype=torch.float64)
    everything = torch.ones(2, length, dtype=torch.float64)
    blocked, band, source, target = module.BigBirdModel.create_masks_for_block_sparse_attn(everything, size)
    expected = oracle(hidden, band, source, target, blocked, blocked)[0]
    np.random.seed(3)
    lengths, numbers = oracle._get_rand_attn_plan(length, size, 1)
    (drawn,) = oracle._bigbird_block_rand_mask_with_head(length, length, size, size, 1, lengths, numbers)
    np.random.set_state(before)

    attention = build("bigbird", 8, block_size=size, num_random_blocks=1)
    index = torch.arange(length // size)
    random = F.pad(torch.from_numpy(drawn).long(), (0, 0, 1, 1))
    # With another seed it may name a block that a row sees already.
    own = ((random - index[:, None]).abs() > 1) & (random > 0) & (random < index[-1])
    assert own[1:-1].all()
    ours = attention.blocks

    def theirs(filled: Tensor) -> tuple[Tensor, Tensor]:
        chosen, used = ours(filled)
        return torch.cat([chosen[..., :5], random.expand(2, -1, -1)], -1), torch.cat(
            [used[..., :5], own.expand(2, -1, -1)], -1
        )

    monkeypatch.setattr(attention, "blocks", theirs)
    query, key, value = (project(hidden)[:, None] for project in (oracle.query, oracle.key, oracle.value))
    found = attention(query, key, value)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_enough_random_blocks_are_softmax_attention() -> None:
    query, key, value = normal(1, 1, 64, 8, scale=2.0)
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        relative_error(build("bigbird", 8, block_size=4, num_random_blocks=r)(query, key, value), exact)
        for r in (0, 4, 8, 16)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12
