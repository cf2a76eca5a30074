"""Training runs of the paper's experiments: a recipe of the package and a few more flags."""

from __future__ import annotations

from dataclasses import dataclass

# alpha in units of 1/255, tuned per model by the paper, as in the recipes
TUNED = {"resnet20s": "0.5", "resnet56s": "1.5", "resnet18": "1.0", "resnet50": "1.5", "resnet101": "1.0"}


@dataclass(frozen=True)
class Run:
    """One way of training.

    Args:
        name: Unique; also of its folders.
        recipe: Of the package.
        flags: Of the training command, on top of the recipe.
        plain: Name of the run that this one is compared with; empty for plain training itself.
    """

    name: str
    recipe: str
    flags: tuple[str, ...] = ()
    plain: str = ""

    @property
    def base(self) -> str:
        """Name of the plain run of the same model and dataset."""
        return self.plain or self.name

    @property
    def dataset(self) -> str:
        """``cifar10``, ``cifar100`` or ``imagenet``."""
        return self.recipe.partition("-")[0]


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is called there, the run, and the paper's accuracy (None where it has none)."""

    label: str
    run: Run
    paper: float | None = None


@dataclass(frozen=True)
class Sheet:
    """A table or figure: its title, its rows, and what a reader should know."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""


def plain(base: str) -> Run:
    """Plain training; ``base`` is dataset and model, such as ``cifar10-resnet18``."""
    return Run(base, base)


def method(base: str, name: str) -> Run:
    """The recipe of a method."""
    return Run(f"{base}-{name}", f"{base}-{name}", plain=base)


def changed(base: str, name: str, suffix: str, flags: str) -> Run:
    """The recipe of a method with some flags changed."""
    return Run(f"{base}-{name}-{suffix}", f"{base}-{name}", tuple(flags.split()), plain=base)


def alfa_with_alpha(base: str, alpha: str) -> Run:
    """ALFA with alpha/255; the recipe itself where that is its alpha."""
    if TUNED[base.partition("-")[2]] == alpha:
        return method(base, "alfa")
    return changed(base, "alfa", f"alpha{alpha}", f"--alfa-alpha {alpha}/255")


def alfa_at(base: str, *blocks: str, last: str) -> Run:
    """ALFA at other blocks; the recipe itself where the block is the last one."""
    if blocks == (last,):
        return method(base, "alfa")
    return changed(base, "alfa", "at-" + "-".join(blocks), "--alfa-blocks " + " ".join(blocks))
