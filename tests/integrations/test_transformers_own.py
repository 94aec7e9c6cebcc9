"""The tests that transformers itself has for all its models, over three families whose attention is ours.

They are not in the installed package. The source distribution of the same version holds those of models in general, a
checkout also those of generation: SCHOENBAT_TRANSFORMERS_TESTS names the folder `tests` of either. A test that does not
apply is listed below with the reason; each other one counts, also such as a later version adds.
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra schoenbat[hf]")
pytest.importorskip("parameterized", reason="transformers' own tests need the package parameterized")

from parameterized import parameterized
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from schoenbat.estimate import Estimate
from schoenbat.integrations.huggingface import KernelCache, register

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("SCHOENBAT_TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("SCHOENBAT_TRANSFORMERS_TESTS names no folder of transformers' tests", allow_module_level=True)


def load(name: str, absent: str) -> Any:
    """The class `absent` of a module of the folder, or an empty one where the module is not there."""
    full = f"tests.{name}"
    if not Path(FOLDER, *name.split(".")).with_suffix(".py").is_file():
        package = types.ModuleType(full.rpartition(".")[0])
        package.__path__ = []
        sys.modules.setdefault(package.__name__, package)
        sys.modules[full] = types.ModuleType(full)
        setattr(sys.modules[full], absent, type(absent, (), {}))
    return getattr(importlib.import_module(full), absent)


root = types.ModuleType("tests")
root.__path__ = [FOLDER]
sys.modules["tests"] = root
load("exporters.test_export", "ExportTesterMixin")
GenerationTesterMixin = load("generation.test_utils", "GenerationTesterMixin")
ModelTesterMixin = load("test_modeling_common", "ModelTesterMixin")
common = sys.modules["tests.test_modeling_common"]

register("schoenbat-own-exact", Estimate(num_features=None))
register("schoenbat-own-4096", Estimate(num_features=4096))


class Models:
    """Small models and inputs, under the names that transformers' tests ask for."""

    batch_size, seq_length, is_training, vocab_size = 4, 7, True, 99
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37

    def __init__(self, config_class: type[PreTrainedConfig], **options: Any) -> None:
        self._config_class, self._options = config_class, options

    def get_config(self) -> PreTrainedConfig:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes = {name: getattr(self, name) for name in names}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return self._config_class(attn_implementation="schoenbat", **tokens, **sizes, **self._options)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


WEIGHTS = "asks for attention weights, of which linear attention has none"
PAIRS = "needs a mask of pairs, which linear attention refuses"
FIXED = "needs a cache of fixed length for keys and values, which linear attention refuses"
DOES_NOT_APPLY = {
    "test_capture_outputs_decorator": WEIGHTS,
    "test_custom_4d_attention_mask": PAIRS,
    "test_eager_padding_matches_padding_free_with_position_ids": PAIRS,
    "test_sdpa_padding_matches_padding_free_with_position_ids": PAIRS,
    "test_generate_compilation_all_outputs": FIXED,
    "test_generate_compile_model_forward_fullgraph": FIXED,
    "test_generate_from_inputs_embeds_with_static_cache": FIXED,
    "test_generate_with_static_cache": FIXED,
    "test_static_cache_no_recompile_with_smaller_length": FIXED,
}


CROPS = "takes tokens out of the cache again, which KernelCache refuses"
SHAPES = "looks at the shapes of the keys and values in the cache, of which KernelCache has none"
DOES_NOT_APPLY_TO_KERNEL_CACHE = {
    "test_assisted_decoding_matches_greedy_search_0_random": CROPS,
    "test_assisted_decoding_matches_greedy_search_1_same": CROPS,
    "test_assisted_decoding_sample": CROPS,
    "test_beam_search_generate_dict_outputs_use_cache": SHAPES,
    "test_greedy_generate_dict_outputs_use_cache": SHAPES,
}


def models_of(family: str) -> Models:
    match family:
        case "llama":
            return Models(LlamaConfig, num_key_value_heads=2)
        case "gpt2":
            return Models(GPT2Config, n_inner=37, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        case "bert":
            return Models(BertConfig, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    raise AssertionError(family)


class Applying:
    family: str

    def setUp(self):
        if reason := DOES_NOT_APPLY.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = models_of(self.family)
        # What their tests skip without attention weights is no more than that, but for this one.
        self.has_attentions = self._testMethodName == "test_left_padding_compatibility"


class Common(Applying, ModelTesterMixin):
    @parameterized.expand(common.TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION)
    def test_eager_matches_sdpa_inference(self, name, dtype, side, masked, output_attentions, kernels):
        """Their comparison under padding on either side, with ours in the place of sdpa.

        They let one sequence in five differ, and only one of seven is padded: here all have to agree.
        """
        if output_attentions:
            self.skipTest(WEIGHTS)
        from_pretrained = PreTrainedModel.from_pretrained.__func__
        for implementation in ("schoenbat-own-exact", "schoenbat-own-4096"):

            def load(cls, *args, attn_implementation=None, implementation=implementation, **options):
                assert attn_implementation == "sdpa"
                return from_pretrained(cls, *args, attn_implementation=implementation, **options)

            with (
                self.subTest(implementation),
                mock.patch.object(self, "has_attentions", True),
                mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load)),
                mock.patch.object(common, "np", types.SimpleNamespace(mean=min)),
            ):
                common._test_eager_matches_sdpa_inference(self, name, dtype, side, masked, False, kernels)


class WithKernelCache(Applying, GenerationTesterMixin):
    """Generation with a cache of fixed size wherever transformers would make its own."""

    def setUp(self):
        super().setUp()
        if reason := DOES_NOT_APPLY_TO_KERNEL_CACHE.get(self._testMethodName):
            self.skipTest(reason)
        patch = mock.patch("transformers.generation.utils.DynamicCache", side_effect=lambda *_, **__: KernelCache())
        patch.start()
        self.addCleanup(patch.stop)


class LlamaTest(Common, GenerationTesterMixin, unittest.TestCase):
    family, all_model_classes = "llama", (LlamaModel, LlamaForCausalLM)


class LlamaKernelCacheTest(WithKernelCache, unittest.TestCase):
    family, all_generative_model_classes = "llama", (LlamaForCausalLM,)


class GPT2Test(Common, GenerationTesterMixin, unittest.TestCase):
    family, all_model_classes = "gpt2", (GPT2Model, GPT2LMHeadModel)


class GPT2KernelCacheTest(WithKernelCache, unittest.TestCase):
    family, all_generative_model_classes = "gpt2", (GPT2LMHeadModel,)


class BertTest(Common, unittest.TestCase):
    family, all_model_classes = "bert", (BertModel, BertForMaskedLM)
