"""Linear attentions of other libraries for the benchmark, where they are installed (the extra `rivals`)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rival:
    """An estimate of softmax attention on [B, H, N, head_dim]; N must be a multiple of `multiple_of`."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    multiple_of: int = 1


def installed_rivals(*, heads: int, head_dim: int, num_features: int, device: torch.device) -> Iterator[Rival]:
    """Yield performer-pytorch with `num_features` features and transformers' Nystromformer with as many landmarks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            from performer_pytorch import FastAttention
        except ImportError:
            pass
        else:
            yield Rival("performer-pytorch", FastAttention(dim_heads=head_dim, nb_features=num_features).to(device))
        try:
            from transformers import NystromformerConfig
            from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention
        except ImportError:
            pass
        else:
            config = NystromformerConfig(
                hidden_size=heads * head_dim,
                num_attention_heads=heads,
                num_landmarks=num_features,
                attention_probs_dropout_prob=0.0,
            )
            # The configuration takes no None here, though the attention does: an untrained convolution only adds noise.
            config.__dict__["conv_kernel_size"] = None
            yield Rival("transformers-nystromformer", _attend_by(NystromformerSelfAttention(config)), num_features)


def _attend_by(attention: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the attention between the projections, in whose place parts of what stands for the hidden states go."""
    for part, name in enumerate(("query", "key", "value")):
        delattr(attention, name)
        setattr(attention, name, lambda joined, part=part: joined.chunk(3, -1)[part])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention.seq_len = query.shape[-2]
        (attended,) = attention(torch.cat([x.transpose(1, 2).flatten(-2) for x in (query, key, value)], -1))
        return torch.as_tensor(attended).unflatten(-1, (query.shape[1], -1)).transpose(1, 2)

    return attend
