"""ListOps: values agree with a plain evaluator, shapes with a plain recursive generator of the same distribution."""

import importlib
import random
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.data.arrays import SPLITS, Dataset
from schoenbat.lra.tasks import TASKS

ListOps: Any = TASKS.get("lra-listops")
TOKENS = importlib.import_module("schoenbat.lra.tasks.lra-listops").TOKENS


def prepare(folder: Path, **options: int) -> Dataset:
    ListOps(ListOps.Config(**options)).prepare(folder, folder / "set")
    return Dataset(folder / "set")


def expressions(dataset: Dataset, split: str) -> list[tuple[list[str], int]]:
    batch = dataset.batch(split, np.arange(dataset.num_examples(split)))
    rows = zip(batch.tokens[:, 0].tolist(), batch.labels.tolist(), strict=True)
    return [([TOKENS[token] for token in tokens if token], label) for tokens, label in rows]


def evaluate(tokens: list[str]) -> int:
    """The value of a whole expression, read from left to right with a stack."""
    stack: list[tuple[str, list[int]]] = [("", [])]
    for token in tokens:
        if token.startswith("["):
            stack.append((token, []))
        elif token == "]":
            operator, values = stack.pop()
            assert len(values) >= 2
            result = {
                "[MIN": min(values),
                "[MAX": max(values),
                "[MED": int(statistics.median(values)),
                "[SM": sum(values) % 10,
            }[operator]
            stack[-1][1].append(result)
        else:
            stack[-1][1].append(int(token))
    ((_, values),) = stack
    (value,) = values
    return value


def shallow(tokens: list[str], levels: int) -> int:
    """The same of the expression without operators below `levels`, found by cutting them out of the text first."""
    kept, level = [], 0
    for token in tokens:
        level += token.startswith("[")
        if level <= levels:
            kept.append(token)
        level -= token == "]"
    text = " ".join(kept)
    while (without := re.sub(r"\[\w+ \] ?", "", text)) != text:
        text = without
    return int(evaluate_any(text.split())) if text else 0


def evaluate_any(tokens: list[str]) -> int:
    """As `evaluate`, also for operators of a single argument."""
    if len(tokens) == 1:
        return int(tokens[0])
    values, inner, level = [], [], 0
    for token in tokens[1:-1]:
        inner.append(token)
        level += token.startswith("[")
        level -= token == "]"
        if level == 0:
            values.append(evaluate_any(inner))
            inner = []
    middle = statistics.median(values)
    return {"[MIN": min(values), "[MAX": max(values), "[MED": int(middle), "[SM": sum(values) % 10}[tokens[0]]


def depth(tokens: list[str]) -> int:
    level = deepest = 0
    for token in tokens:
        level += token.startswith("[")
        deepest = max(deepest, level)
        level -= token == "]"
    return deepest


def test_labels_are_the_values_of_the_expressions(tmp_path: Path) -> None:
    dataset = prepare(tmp_path, train_size=300, dev_size=100, test_size=100)
    for split in SPLITS:
        for tokens, label in expressions(dataset, split):
            assert evaluate(tokens) == label


@pytest.mark.slow
def test_every_test_label_of_the_published_set_up_is_right_and_its_statistics_are_those_of_the_rule(
    tmp_path: Path,
) -> None:
    """The test set of profile paper. Its statistics against 2,000 expressions of a plain recursive generator, each
    within 4 standard errors of both (6 values, a false-alarm rate of 4e-4); the depth is always 9."""
    source = random.Random(2)

    def draw(level: int) -> list[str]:
        if level < 10 and (level == 1 or source.random() < 0.25):
            arguments = [token for _ in range(source.randint(2, 10)) for token in draw(level + 1)]
            return [source.choice(["[MIN", "[MAX", "[MED", "[SM"]), *arguments, "]"]
        return [str(source.randint(0, 9))]

    expected: list[list[str]] = []
    while len(expected) < 2000:
        tokens = draw(1)
        if 500 < len(tokens) < 2000:
            expected.append(tokens)
    found = expressions(prepare(tmp_path, train_size=2, dev_size=2), "test")
    assert len(found) == 2000
    assert all(evaluate(tokens) == label for tokens, label in found)
    measures = {
        "length": len,
        "depth": depth,
        "operators": lambda tokens: sum(token.startswith("[") for token in tokens),
        "label is 0": lambda tokens: evaluate(tokens) == 0,
        "label is 9": lambda tokens: evaluate(tokens) == 9,
        "outermost is MED": lambda tokens: tokens[0] == "[MED",
    }
    for name, measure in measures.items():
        ours, theirs = (np.array([float(measure(t)) for t in s]) for s in ([t for t, _ in found], expected))
        error = np.sqrt((ours.var() + theirs.var()) / 2000)
        print(f"{name}: {ours.mean():.4g} here, {theirs.mean():.4g} there, standard error {error:.2g}")
        assert abs(ours.mean() - theirs.mean()) <= 4 * error, name


def test_baselines_are_the_rules_that_they_are_called(tmp_path: Path) -> None:
    """Against the same rules over words."""
    dataset = prepare(
        tmp_path, min_length=10, max_length=60, train_size=2000, dev_size=2, test_size=300, max_depth=5, max_args=4
    )
    found = ListOps(ListOps.Config()).baselines(dataset)
    train, test = expressions(dataset, "train"), expressions(dataset, "test")
    answers = {
        operator: statistics.mode(sorted(label for tokens, label in train if tokens[0] == operator))
        for operator in ("[MIN", "[MAX", "[MED", "[SM")
    }
    assert found["outermost operator"] == np.mean([answers[tokens[0]] == label for tokens, label in test])
    for levels, name in ((1, "shallow evaluation, one level"), (2, "shallow evaluation, two levels")):
        assert found[name] == np.mean([shallow(tokens, levels) == label for tokens, label in test])
    assert found["majority class"] < found["outermost operator"] < found["shallow evaluation, two levels"]
    assert found["outermost operator"] < found["operator, smallest and largest direct digit"]


def test_the_evaluation_of_all_levels_is_no_baseline(tmp_path: Path) -> None:
    sizes = {"min_length": 3, "max_length": 34, "train_size": 200, "dev_size": 2, "test_size": 50}
    depth = {"max_depth": 3, "max_args": 5}
    found = ListOps(ListOps.Config(**sizes, **depth)).baselines(prepare(tmp_path, **sizes, **depth))
    assert "shallow evaluation, one level" in found
    assert "shallow evaluation, two levels" not in found


def test_limits_hold(tmp_path: Path) -> None:
    dataset = prepare(
        tmp_path, min_length=20, max_length=60, train_size=300, dev_size=50, test_size=50, max_depth=5, max_args=4
    )
    found = [tokens for split in SPLITS for tokens, _ in expressions(dataset, split)]
    lengths = [len(tokens) for tokens in found]
    assert min(lengths) == 21
    assert 50 < max(lengths) < 60
    assert max(depth(tokens) for tokens in found) == 4, "operators lie at depths 1 to max_depth - 1"
    assert len({" ".join(tokens) for tokens in found}) == 400


def test_lengths_follow_the_recursive_generator(tmp_path: Path) -> None:
    """Mean length over 20,000 draws each; a difference beyond 4 standard errors has a false-alarm rate of 6e-5."""
    source = random.Random(1)

    def draw_length(level: int) -> int:
        if level < 3 and source.random() <= 0.25:
            return 2 + sum(draw_length(level + 1) for _ in range(source.randint(2, 10)))
        return 1

    expected: list[int] = []
    while len(expected) < 20_000:
        length = draw_length(1)
        if length > 10:
            expected.append(length)
    dataset = prepare(tmp_path, min_length=10, max_length=200, max_depth=3, train_size=20_000, dev_size=1, test_size=1)
    found = dataset.batch("train", np.arange(20_000)).key_mask.sum(-1).double()
    error = ((statistics.variance(expected) + float(found.var())) / 20_000) ** 0.5
    assert abs(statistics.mean(expected) - float(found.mean())) < 4 * error


def test_no_expression_comes_twice_where_few_exist(tmp_path: Path) -> None:
    """400 expressions have the only length allowed, 4 tokens."""
    dataset = prepare(tmp_path, min_length=3, max_length=5, train_size=300, dev_size=40, test_size=40)
    found = [" ".join(tokens) for split in SPLITS for tokens, _ in expressions(dataset, split)]
    assert len(set(found)) == len(found) == 380


def test_operators_and_digits_are_uniform(tmp_path: Path) -> None:
    """Chi-square of about 25,000 operators and 100,000 digits, each below its 99.99 % point."""
    dataset = prepare(tmp_path, min_length=100, max_length=1000, train_size=500, dev_size=1, test_size=1)
    counts = np.bincount(dataset.batch("train", np.arange(500)).tokens.ravel().numpy(), minlength=len(TOKENS))
    for start, end, limit in ((1, 5, 21.1), (6, 16, 33.7)):
        seen = counts[start:end]
        assert ((seen - seen.mean()) ** 2 / seen.mean()).sum() < limit
    assert counts[1:5].sum() == counts[5], "every bracket is closed"


def test_a_seed_is_a_data_set_and_dev_and_test_ignore_the_training_size(tmp_path: Path) -> None:
    small = {"min_length": 20, "max_length": 100, "dev_size": 20, "test_size": 20}
    one = prepare(tmp_path / "1", train_size=50, **small)
    more = prepare(tmp_path / "2", train_size=500, **small)
    other = prepare(tmp_path / "3", train_size=50, seed=1, **small)
    for split in ("dev", "test"):
        assert expressions(one, split) == expressions(more, split) != expressions(other, split)
    assert expressions(more, "train")[:50] == expressions(one, "train")


def test_label_tells_the_settings_that_are_not_those_of_the_arena(tmp_path: Path) -> None:
    dataset = prepare(tmp_path, min_length=20, max_length=100, train_size=50, dev_size=2, test_size=2)
    assert dataset.meta["label"] == "generated ListOps, seed 0, 50 training examples of 20 to 100 tokens"


def test_impossible_settings_end_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 0 of 6 different expressions between 500 and 2000 tokens"):
        prepare(tmp_path, max_depth=2, train_size=2, dev_size=2, test_size=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"train_size": 0}, {"max_depth": 1}, {"max_args": 1}, {"min_length": 1999}, {"seed": -1}]
)
def test_wrong_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="here: "):
        build_config(ListOps.Config, options, "here")
