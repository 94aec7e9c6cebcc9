"""Every model type of transformers that builds as a tiny random configuration, under our attention and under its own.

    python tests/integrations/sweep.py [TYPE ...]

prints one line for each: equal, refused with the reason, does not build with the reason, or what is wrong with it.
Without names it takes all types; the exit code tells whether any was wrong. `test_every_model_type` runs a third.
"""

import copy
import inspect
import os
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tiny_models import (
    Case,
    DoesNotBuild,
    Inputs,
    class_of,
    config_of,
    decoder_cases,
    model_of,
    other_inputs,
    text_cases,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AttentionInterface, PreTrainedConfig, PreTrainedModel

from schoenbat.errors import UserError
from schoenbat.estimate import Estimate
from schoenbat.integrations.huggingface import KernelCache, install, register

register("sweep-exact", Estimate(num_features=None))
register("sweep-64", Estimate(num_features=64))
CALLS: list[str] = []


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function, noting in CALLS the layers that use it."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        CALLS.append(type(module).__name__)
        return function(module, *args, **kwargs)

    return attention


for _name in ("sweep-exact", "sweep-64"):
    AttentionInterface.register(_name, counted(AttentionInterface()[_name]))

TOLERANCE = 1e-4

# Types that go through the interface in part only, and not in what these calls reach.
OWN_ATTENTION = {
    "patchtsmixer": "gates within a patch, and attention where the configuration asks for it",
    "pp_formulanet_vision": "windows with relative positions; the text model goes through the interface",
}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise DoesNotBuild(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def first_tensor(out: Any) -> Tensor:
    values = out.values() if hasattr(out, "values") else out if isinstance(out, tuple | list) else [out]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
        if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            return value[0]
    raise DoesNotBuild("its output holds no tensor to compare")


class OtherAttention(TorchDispatchMode):
    """Counts what looks like attention that is not ours: fused attention, or a softmax over rows of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        rows = args[0].dim() >= 3 and args[0].shape[-2] > 1 if "softmax" in name else "scaled_dot_product" in name
        if rows:
            self.seen.append(f"{name.split('::')[-1]} of {list(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def output_of(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return first_tensor(model(**inputs, **options))


def in_steps(model: PreTrainedModel, case: Case, name: str, cache: Any = None) -> Tensor:
    """The outputs of a causal model that is given 4 tokens, 2 and 1, with the cache that it makes itself."""
    prefix = "decoder_" if "decoder_input_ids" in case.inputs else ""
    ids, mask = case.inputs[prefix + "input_ids"], case.inputs.get(prefix + "attention_mask")
    parts, done = [], 0
    for step in (4, 2, 1) if ids.shape[1] == 7 else (2, 2, 1):
        inputs = {**case.inputs, prefix + "input_ids": ids[:, done : done + step], "use_cache": True, name: cache}
        if mask is not None:
            inputs[prefix + "attention_mask"] = mask[:, : done + step]
        with torch.no_grad():
            out = model(**inputs)
        cache = getattr(out, name, None)
        if cache is None:
            raise DoesNotBuild("makes no cache")
        parts.append(first_tensor(out))
        done += step
    return torch.cat(parts, 1)


@dataclass
class Verdict:
    """Of one type: what each case gave."""

    model_type: str
    family: str = ""
    missing: str = ""
    equal: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    without: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def state(self) -> str:
        if self.missing:
            return "does not build"
        if self.wrong:
            return "WRONG"
        if self.refused:
            return "refused in part" if self.equal else "refused"
        return "equal"

    def __str__(self) -> str:
        what = {
            "does not build": self.missing,
            "WRONG": "; ".join(self.wrong[:3]),
        }.get(self.state, "; ".join(f"{n} x {reason}" for reason, n in self.refused.items()))
        if self.without and self.state != "does not build":
            what = "; ".join([what, *(f"without: {reason}" for reason in sorted(self.without))]).removeprefix("; ")
        return f"{self.model_type:32} {self.state:16} {self.equal:3} equal  {what}"


def differs(found: Tensor, expected: Tensor, real: Tensor | None) -> float:
    """The largest difference where it counts, relative to the largest output."""
    if real is not None and found.shape[: real.dim()] == real.shape:
        found, expected = found[real], expected[real]
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def cases_of(model: PreTrainedModel) -> list[Case]:
    """The calls that the model itself can take."""
    names = set(inspect.signature(model.forward).parameters)
    text = list(text_cases(names, "decoder_input_ids" in names)) if "input_ids" in names else []
    if any(works(model, case.inputs) for case in text[:2]):
        return [case for case in text if works(model, case.inputs)]
    for inputs in other_inputs(model, names):
        alone = [Case(f"batch {batch}", inputs(batch)) for batch in (1, 3)]
        if works(model, alone[0].inputs):
            return [case for case in alone if works(model, case.inputs)]
        both = [with_more(case, inputs(len(case.inputs["input_ids"]))) for case in text]
        if both and works(model, both[0].inputs):
            return [case for case in both if works(model, case.inputs)]
    return []


def with_more(case: Case, more: Inputs) -> Case:
    changed = None if case.changed is None else {**more, **case.changed}
    return Case(case.name, {**more, **case.inputs}, case.real, changed)


def works(model: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether the unchanged model takes this call: what it does not take says nothing about ours."""
    try:
        return bool(torch.isfinite(output_of(model, inputs)).all())
    except DoesNotBuild:
        raise
    except Exception:  # noqa: BLE001 (any of a thousand complaints of foreign code)
        return False


Take = Callable[[PreTrainedModel], Tensor]


def judge(model_type: str) -> Verdict:
    """One type through all of its cases."""
    verdict, start = Verdict(model_type), time.monotonic()
    try:
        with within(40):
            _judge(verdict)
    except DoesNotBuild as error:
        verdict.missing = str(error)
    verdict.seconds = time.monotonic() - start
    return verdict


def _judge(verdict: Verdict) -> None:
    model_class = class_of(verdict.model_type)
    why = "no input found that it takes"
    for layers, sections in ((2, False), (4, False), (2, True)):  # some kinds of layers come third or fourth only
        try:
            config = config_of(verdict.model_type, layers, sections)
            eager = model_of(model_class, config, "eager")
            cases = cases_of(eager)
        except DoesNotBuild:
            raise
        except Exception as error:  # noqa: BLE001 (foreign code complains in any way)
            why, cases = one_line(error), []
        if cases:
            break
    else:
        raise DoesNotBuild(why)
    verdict.family = model_class.__name__
    _compare(verdict, model_class, config, eager, cases)
    decoder = _decoder_of(verdict.model_type, model_class)
    if decoder is not None:
        names = set(inspect.signature(decoder.forward).parameters)
        wanted = [case for case in decoder_cases(names, decoder.config.hidden_size) if works(decoder, case.inputs)]
        if wanted:
            _compare(verdict, model_class, decoder.config, decoder, wanted)


def _decoder_of(model_type: str, model_class: type[PreTrainedModel]) -> PreTrainedModel | None:
    """The same text model as a causal decoder with cross attention, where there is such a thing."""
    if "encoder_hidden_states" not in inspect.signature(model_class.forward).parameters:
        return None
    try:
        return model_of(model_class, config_of(model_type, is_decoder=True, add_cross_attention=True), "eager")
    except DoesNotBuild:
        raise
    except Exception:  # noqa: BLE001
        return None


def blind_alone(model: PreTrainedModel, case: Case) -> bool:
    """Whether the unchanged model is causal: its last token changes no output before it."""
    assert case.changed is not None
    ids = case.inputs.get("decoder_input_ids", case.inputs["input_ids"])
    first, second = (output_of(model, inputs) for inputs in (case.inputs, case.changed))
    return first.shape[:2] == ids.shape and torch.equal(first[:, :-1], second[:, :-1])


def _compare(
    verdict: Verdict,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    eager: PreTrainedModel,
    cases: list[Case],
) -> None:
    def note(name: str, do: Callable[[], str | None]) -> None:
        """Count what `do` comes to: nothing, a refusal, or something wrong."""
        try:
            wrong = do()
        except UserError as error:
            verdict.refused[one_line(error)] += 1
        except DoesNotBuild:
            raise
        except Exception as error:  # noqa: BLE001
            verdict.wrong.append(f"{name}: {one_line(error)}")
        else:
            if wrong is None:
                verdict.equal += 1
            else:
                verdict.wrong.append(f"{name}: {wrong}")

    models: dict[str, PreTrainedModel] = {}

    def build(attention: str) -> str | None:
        models[attention] = model_of(model_class, config, attention)
        return None

    def equal(model: PreTrainedModel, case: Case, take: Take) -> str | None:
        error = differs(take(model), take(eager), case.real)
        return None if error <= TOLERANCE else f"differs by {error:.2g}"

    def switched() -> str | None:
        """transformers itself warns where it cannot set the attention, and leaves the model as it is."""
        model = copy.deepcopy(eager)
        model.set_attn_implementation("sweep-exact")
        CALLS.clear()
        wrong = equal(model, cases[0], lambda m: output_of(m, cases[0].inputs))
        if not models and not CALLS and model.config._attn_implementation == "sweep-exact":
            verdict.without.add("set_attn_implementation takes the name, without an effect or a word")
        return wrong

    def installed() -> str | None:
        CALLS.clear()
        try:
            output_of(install(copy.deepcopy(eager), "sweep-64"), cases[0].inputs)
        except UserError as error:
            if models and "has no attention layer" in str(error):
                verdict.without.add(str(error))
                return None
            raise
        return None if models else "install takes what cannot be built"

    for attention in ("sweep-exact", "sweep-64"):
        note(f"building {attention}", lambda a=attention: build(a))
    if len(models) < 2:
        counted_before = verdict.equal
        note("set_attn_implementation", switched)
        note("install", installed)
        verdict.equal = counted_before
        return
    verdict.equal -= 2

    def same_with_kernel_cache(case: Case) -> str | None:
        # Where a denominator is small, float32 is no measure; but some layers know nothing wider.
        double = copy.deepcopy(models["sweep-64"]).double()
        model = double if works(double, case.inputs) else models["sweep-64"]
        expected = in_steps(model, case, name_of_cache)
        try:
            found = in_steps(model, case, name_of_cache, KernelCache())
        except UserError as error:
            verdict.without.add(str(error))
            return None
        except ValueError as error:
            if "KernelCache" not in str(error):  # a model may itself say that it needs another cache
                raise
            verdict.without.add(str(error))
            return None
        error = differs(found, expected, case.real)
        return None if error <= 10 * TOLERANCE else f"differs by {error:.2g}"

    def blind(case: Case) -> str | None:
        assert case.changed is not None
        first, second = (output_of(models["sweep-64"], inputs)[:, :-1] for inputs in (case.inputs, case.changed))
        change = (first - second).abs().max().item()
        return f"sees the future by {change:.2g}" if change > 1e-5 else None

    def all_ours(case: Case) -> str | None:
        CALLS.clear()
        with OtherAttention() as other:
            output_of(models["sweep-64"], case.inputs)
        verdict.other += other.seen
        if other.seen and not CALLS and verdict.model_type not in OWN_ATTENTION:
            return f"pays no attention to the name: {other.seen[0]}"
        return None

    def packed(case: Case, mask: Tensor | None) -> str | None:
        ids = case.inputs["input_ids"]
        more = {"position_ids": (torch.arange(ids.shape[1]) % 4).expand_as(ids), "attention_mask": mask}
        if not works(eager, {**case.inputs, **more}):
            return None
        whole = Case(case.name, {**case.inputs, **more, "use_cache": False})
        try:
            return equal(models["sweep-exact"], whole, lambda m: output_of(m, whole.inputs))
        except UserError as error:
            if "packed sequences" in str(error):
                return None
            raise

    for case in cases:
        if not ignores_padding(eager, case):
            continue
        note(case.name, lambda case=case: equal(models["sweep-exact"], case, lambda m: output_of(m, case.inputs)))
        if case.changed is not None and blind_alone(eager, case):
            note(case.name + ", future", lambda case=case: blind(case))
    note("other attention", lambda: all_ours(cases[0]))
    names = inspect.signature(inspect.unwrap(type(eager).forward)).parameters
    causal = cases[0].changed is not None and blind_alone(eager, cases[0])
    if causal and not verdict.refused and "position_ids" in names and "decoder_input_ids" not in names:
        for mask in (None, torch.ones_like(cases[0].inputs["input_ids"])):
            note("packed", lambda mask=mask: packed(cases[0], mask))
    name_of_cache = next((name for name in ("cache", "past_key_values") if name in names), None)
    if name_of_cache is not None and "input_ids" in cases[0].inputs:
        for case in cases:
            if case.name in ("batch 3", "left padding"):
                try:
                    in_steps(eager, case, name_of_cache)
                except DoesNotBuild:
                    continue
                except Exception:  # noqa: BLE001
                    continue
                note(
                    f"in steps, {case.name}",
                    lambda case=case: equal(models["sweep-exact"], case, lambda m: in_steps(m, case, name_of_cache)),
                )

                if name_of_cache is not None:
                    note(f"KernelCache, {case.name}", lambda case=case: same_with_kernel_cache(case))

    note("set_attn_implementation", switched)
    note("install", installed)


def ignores_padding(eager: PreTrainedModel, case: Case) -> bool:
    """Return whether the model itself gives real tokens the same whatever tokens stand at padding.

    Recurrent layers may read there what attention makes of padding, which means nothing and is not the same for all.
    """
    ids, mask = case.inputs.get("input_ids"), case.inputs.get("attention_mask")
    if ids is None or mask is None or case.real is None:
        return True
    changed = {**case.inputs, "input_ids": ids.masked_fill(mask == 0, 7)}
    return differs(output_of(eager, changed), output_of(eager, case.inputs), case.real) <= TOLERANCE


def all_types() -> list[str]:
    """Each type whose configuration class no earlier type has."""
    first = {CONFIG_MAPPING[name]: name for name in reversed(list(CONFIG_MAPPING))}
    return sorted(first.values())


def share(names: list[str], which: int, shares: int, salt: str = "") -> list[str]:
    """One of so many parts of the names, the same everywhere and whatever other names there are."""
    return [name for name in names if zlib.crc32(f"{salt}{name}".encode()) % shares == which]


def quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def main(names: list[str]) -> int:
    quiet()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for name in names or all_types():
        verdict = judge(name)
        counts[verdict.state] += 1
        print(verdict, f"[{verdict.seconds:.1f} s]" if verdict.seconds > 5 else "", flush=True)
        if verdict.other:
            print(f"{'':32} other attention: {Counter(verdict.other).most_common(3)}", flush=True)
    print(", ".join(f"{n} {state}" for state, n in counts.most_common()), f"in {time.monotonic() - start:.0f} s")
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
