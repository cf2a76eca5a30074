"""Every public name, method and argument is documented, and the API page shows them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import timm

import timm_alfa


def public_modules() -> list[ModuleType]:
    """This package and those of its modules that say what is public in them, but for the training command's own."""
    names = [info.name for info in pkgutil.walk_packages(timm_alfa.__path__, "timm_alfa.")]
    modules = [
        importlib.import_module(name)
        for name in names
        if not name.endswith("__main__") and not name.startswith("timm_alfa.train.")
    ]
    return [timm_alfa, *(module for module in modules if hasattr(module, "__all__"))]


def public_callables() -> Iterator[tuple[str, Any, str]]:
    """Functions and classes by their full names, the public methods that a class defines, and their documentation.

    A constructor may be explained by its class, and a method by the one that it overrides.
    """
    seen = set()
    for module in public_modules():
        for name in module.__all__:
            item = getattr(module, name)
            if not callable(item) or not item.__module__.startswith("timm_alfa") or item in seen:
                continue
            seen.add(item)
            full = f"{item.__module__}.{item.__qualname__}"
            if not inspect.isclass(item):
                yield full, item, inspect.getdoc(item) or ""
                continue
            yield full, item.__init__ if "__init__" in vars(item) else None, _documentation(item, "__init__")
            for key, member in vars(item).items():
                member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(member) and not key.startswith("_"):
                    yield f"{full}.{key}", member, _documentation(item, key)


def _documentation(item: type, method: str) -> str:
    texts = [item.__doc__ if method == "__init__" else None]
    texts += [getattr(vars(base).get(method), "__doc__", None) for base in item.__mro__ if base is not object]
    return "\n".join(text for text in texts if text)


CALLABLES = {name: (item, text) for name, item, text in public_callables()}


def arguments(item: Any) -> list[str]:
    """Names of the arguments that have to be explained; what a model of timm's takes, timm explains."""
    if item is None or timm.models.is_model(item.__name__):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(item).parameters.values()
    return [value.name for value in found if value.name not in ("self", "cls") and value.kind not in kinds]


@pytest.mark.parametrize("module", public_modules(), ids=lambda module: module.__name__)
def test_a_module_says_what_it_is(module: ModuleType):
    assert module.__doc__
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("name", CALLABLES)
def test_documented(name: str):
    item, text = CALLABLES[name]
    assert len(text.split()) > 1, f"{name} has no docstring"
    missing = [  # each in "name: ...", perhaps as one of several ("a, b, c: ..."), or in `name`
        argument for argument in arguments(item) if not re.search(rf"(?:^|[\s`]){argument}(?:,\s+\w+)*[:`]", text)
    ]
    assert not missing, f"{name}: the docstring does not explain {', '.join(missing)}"


def test_the_check_notices_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    def undocumented(first: int, second: int) -> None:
        """Something with `first` alone."""

    monkeypatch.setitem(CALLABLES, "undocumented", (undocumented, inspect.getdoc(undocumented) or ""))
    with pytest.raises(AssertionError, match="does not explain second"):
        test_documented("undocumented")
