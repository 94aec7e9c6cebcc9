"""LSH attention against transformers', and against a dense form that counts how often a pair meets."""

import pytest
import torch
from heads import build, normal, ragged
from torch import Tensor


def dense(q: Tensor, v: Tensor, rotations: Tensor, size: int) -> Tensor:
    """One head [N, d]: softmax over all keys with the logarithm of how often a key stands in the two chunks."""
    length = len(q)
    keys = q / q.norm(dim=-1, keepdim=True)
    logits = q @ keys.T
    outputs, logs = [], []
    for rotation in rotations:
        projected = q @ rotation
        bucket = torch.cat([projected, -projected], -1).argmax(-1).tolist()
        order = sorted(range(length), key=lambda i: (bucket[i], i))
        chunks = [order[start : start + size] for start in range(0, length, size)]
        counts = torch.zeros(length, length, dtype=torch.float64)
        for place, chunk in enumerate(chunks):
            for i in chunk:
                for j in chunk if len(chunks) == 1 else chunk + chunks[place - 1]:
                    counts[i, j] += 1
        scores = logits.masked_fill(torch.eye(length, dtype=torch.bool), -1e5) + counts.log()
        logs.append(scores.logsumexp(-1))
        outputs.append(scores.softmax(-1) @ v)
    shares = torch.stack(logs).softmax(0)
    return (torch.stack(outputs) * shares[..., None]).sum(0)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("length", "padded"), [(48, 48), (48, 60), (41, 60), (5, 60), (1, 60)])
def test_it_is_the_dense_form_on_the_real_tokens(length: int, padded: int, rounds: int) -> None:
    query, _, value = normal(1, 1, padded, 8)
    attention = build("reformer", 8, num_hashes=rounds, num_buckets=6, chunk_size=6)
    found = attention(query, query, value, ragged([length], padded))[0, 0, :length]
    expected = dense(query[0, 0, :length], value[0, 0, :length], attention.rotations, 6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_one_round_is_transformers_reformer() -> None:
    # With several rounds the first chunk of a round looks back elsewhere there.
    module = pytest.importorskip(
        "transformers.models.reformer.modeling_reformer", reason="transformers (extra oracles) is not installed"
    )
    config = module.ReformerConfig(
        attention_head_size=8,
        num_attention_heads=1,
        hidden_size=8,
        num_hashes=1,
        num_buckets=8,
        lsh_attn_chunk_length=8,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        attn_layers=["lsh"],
        is_decoder=False,
        hash_seed=0,
        lsh_attention_probs_dropout_prob=0.0,
    )
    attention = build("reformer", 8, num_hashes=1, num_buckets=8, chunk_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        oracle = module.LSHSelfAttention(config, layer_idx=0).double().eval()
        hidden = 3 * torch.randn(2, 48, 8, dtype=torch.float64)
        expected = oracle(hidden, attention_mask=torch.ones(2, 48, dtype=torch.bool)).hidden_states
        torch.manual_seed(0)
        attention.rotations = torch.randn(1, 8, 1, 4, dtype=torch.float64)[0].transpose(0, 1)
    query = oracle.query_key(hidden)[:, None]
    found = attention(query, query, oracle.value(hidden)[:, None])[:, 0]
    # Its norm adds 1e-6 to the mean square.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_that_hold_everything_give_attention_without_oneself() -> None:
    query, _, value = normal(1, 1, 40, 8, scale=2.0)
    logits = query @ (query / query.norm(dim=-1, keepdim=True)).mT
    exact = logits.masked_fill(torch.eye(40, dtype=torch.bool), -torch.inf).softmax(-1) @ value
    errors = []
    for size in (4, 10, 20, 40):
        attention = build("reformer", 8, num_hashes=1, num_buckets=8, chunk_size=size)
        errors.append(float((attention(query, query, value) - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert max(errors[2:]) < 1e-12


def test_more_rounds_find_more_of_the_largest_weights() -> None:
    # Mean recall over 64 queries and 10 draws; one more round adds to it by about a fifth of what is missing.
    query, _, _ = normal(1, 1, 64, 8)
    nearest = (query @ (query / query.norm(dim=-1, keepdim=True)).mT - 1e9 * torch.eye(64)).argmax(-1)[0, 0]
    recalls = []
    for rounds in (1, 4, 16):
        weight = 0.0
        for seed in range(10):
            attention = build("reformer", 8, seed, num_hashes=rounds, num_buckets=8, chunk_size=4)
            weights = attention(query, query, torch.eye(64, dtype=torch.float64)[None, None])[0, 0]
            weight += float((weights[torch.arange(64), nearest] > 0).double().mean()) / 10
        recalls.append(weight)
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.9
