"""The paper's training recipes (section 4.1) as YAML for ``--config``, one file per experiment, by name.

``cifar10``, ``cifar100`` and ``imagenet`` are plain training; the others start with ``base:``, the recipe that they
change, and are named dataset, model, method. ``finetune-small-data`` is this project's own. None says where the images
are.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..errors import UsageError

__all__ = ["find_recipe", "recipe_names"]

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(name: str, flag: str = "--config") -> str:
    """Path of the configuration file that ``name`` means: a file of that path, or else a recipe of that name.

    Args:
        name: As the user wrote it.
        flag: Where; the error starts with it.

    Raises:
        UsageError: There is neither.
    """
    if name in recipe_names() and not os.path.isfile(name):
        return str(_FOLDER / f"{name}.yaml")
    if os.path.exists(name):
        return name
    near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.5)
    hint = f"; nearest recipes: {', '.join(near)}" if near else f"; recipes: {', '.join(recipe_names())}"
    raise UsageError(f"{flag} {name}: no such file, nor a recipe of that name{hint}")
