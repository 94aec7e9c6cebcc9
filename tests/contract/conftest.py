"""Mechanisms that have a compiled form keep their promises in both forms; the others have one."""

import pytest

COMPILED = ("rmfa", "rmfa-sketch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the second form of what has one."""

    def is_needed(item: pytest.Item) -> bool:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return params.get("form") != "torch" or params.get("name", COMPILED[0]) in COMPILED

    config.hook.pytest_deselected(items=[item for item in items if not is_needed(item)])
    items[:] = filter(is_needed, items)
