"""The parts of a run's page: figures, tables and lists, each from records alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from ..run_folder.records import SCORES, RunRecord
from .chart import Line, line_chart
from .markup import element
from .settings import split_settings

BLUE, ORANGE, GREEN = 215, 28, 145
RUN_HUES = (BLUE, ORANGE, GREEN, 325, 265, 185, 55, 0)
RISE = "rise of the loss by delta"
NORMS = (("l2", "l2 norm per image"), ("linf", "largest entry"), ("ratio", "rms relative to the feature's"))

# title of the chart, then column, label, hue and dash of its lines
LOSSES = ("loss", (
    ("train_loss_clean", "training, clean", BLUE, 0),
    ("train_loss_adv", "training, adversarial", ORANGE, 1),
    ("train_loss", "training", BLUE, 0),
    ("eval_loss", "validation", GREEN, 0),
))  # fmt: skip
ACCURACIES = ("validation accuracy (%)", (("eval_top1", "top-1", GREEN, 0), ("eval_top5", "top-5", BLUE, 1)))
LABELS = ("validation mAP and F1 (%)", tuple(
    (name, SCORES[name], hue, dash)
    for name, hue, dash in (
        ("eval_map", GREEN, 0), ("eval_micro_f1", BLUE, 1), ("eval_macro_f1", ORANGE, 2), ("eval_sample_f1", 265, 3)
    )
))  # fmt: skip
RATES = ("learning rate", (("lr", "learning rate", BLUE, 0),))
SPEEDS = ("images per second", (("train_images_per_second", "training", BLUE, 0),))


def section(title: str, *children: Element | None) -> Element | None:
    """A part of the page under a heading; None if nothing is in it."""
    present = [child for child in children if child is not None]
    return element("section", element("h2", title), *present) if present else None


def charts(*figures: Element | None) -> Element | None:
    """Figures side by side where there is room."""
    present = [figure for figure in figures if figure is not None]
    return element("div", *present, class_="charts") if present else None


def metric_chart(record: RunRecord, chart: tuple[str, Sequence[tuple[str, str, int, int]]]) -> Element | None:
    """One of the charts of columns above. ``train_loss`` is left out where its parts are shown."""
    title, columns = chart
    parts = record.series("train_loss_clean")[1]
    return line_chart(title, [
        Line(label, *record.series(column), hue=hue, dash=dash)
        for column, label, hue, dash in columns if not (column == "train_loss" and parts)
    ], zero=chart is SPEEDS)  # fmt: skip


def overlay(
    title: str, runs: Sequence[tuple[str, RunRecord]], columns: Sequence[str], *, zero: bool = False
) -> Element | None:
    """One line per labelled run: the first of ``columns`` that it has."""
    lines = []
    for index, (label, record) in enumerate(runs):
        series = next((found for column in columns if (found := record.series(column))[1]), ([], []))
        lines.append(Line(label, *series, hue=RUN_HUES[index % len(RUN_HUES)], dash=index))
    return line_chart(title, lines, zero=zero)


def eta_chart(record: RunRecord, title: str = "eta") -> Element | None:
    """eta of every block over epochs, as the paper's Figure 4: the last block stands out, 1/r is dotted."""
    blocks = record.eta_blocks
    lines = [
        Line(_marked(block, blocks), *record.eta_series(index), hue=_hue(index, blocks), strong=block == blocks[-1])
        for index, block in enumerate(blocks)
    ]
    return line_chart(title, lines, reference=1 / len(blocks)) if blocks else None


def norm_charts(record: RunRecord) -> Element | None:
    """The perturbations' norms of every block over epochs, one chart per norm."""
    blocks = record.blocks_with("train_delta_l2_")
    return charts(*(
        line_chart(f"delta: {label}", [
            Line(_marked(block, blocks), *record.series(f"train_delta_{norm}_{block}"), hue=_hue(index, blocks),
                 strong=block == blocks[-1])
            for index, block in enumerate(blocks)
        ], zero=True, log=True)
        for norm, label in NORMS
    ), line_chart(RISE, [
        Line(_marked(block, blocks), *record.series(f"train_loss_rise_{block}"), hue=_hue(index, blocks),
             strong=block == blocks[-1])
        for index, block in enumerate(blocks)
    ], zero=True))  # fmt: skip


def block_table(record: RunRecord) -> Element | None:
    """What was last measured of each block."""
    blocks = record.blocks_with("train_delta_l2_")
    names = [
        ("eta", "eta"),
        ("loss_adv", "adversarial loss"),
        ("loss_rise", RISE),
        *((f"delta_{norm}", label) for norm, label in NORMS),
        ("delta_survives", "share of delta that half precision leaves"),
    ]
    columns = [(name, label) for name, label in names if record.blocks_with(f"train_{name}_")]
    rows = [
        [block, *(number(record.last(f"train_{name}_{block}")) for name, _ in columns)]
        for block in blocks
    ]  # fmt: skip
    return table("Blocks, at the end", ["block", *(label for _, label in columns)], rows) if blocks else None


def epoch_table(record: RunRecord) -> Element | None:
    """Every epoch as numbers, folded: what the curves show, to read or to copy."""
    blocks = set(record.eta_blocks) | set(record.blocks_with("train_delta_l2_"))
    names = dict.fromkeys(name for row in record.epochs for name in row if name != "epoch")
    columns = [name for name in names if not any(name.endswith(f"_{block}") for block in blocks)]
    rows = [
        [f"{row['epoch'] + 1:g}", *(number(row.get(name)) for name in columns)]
        for row in record.epochs
    ]  # fmt: skip
    if not rows:
        return None
    heads = ["epoch", *(name.replace("_", " ") for name in columns)]
    return fold("Every epoch as a table", table("Every epoch", heads, rows))


def settings_tables(record: RunRecord) -> list[Element | None]:
    """The command, what was set, and folded what was left at its default."""
    changed, rest = split_settings(record.args)
    command = record.environment.get("command")
    others = {name: value for name, value in record.environment.items() if name != "command"}
    return [
        element("pre", command) if command else None,
        pairs("Set for this run", changed),
        fold(f"{len(rest)} flags at their defaults", pairs("Defaults", rest)) if rest else None,
        pairs("Where it ran", others),
    ]


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, caption: bool = True) -> Element:
    """A table whose rows begin with their names; it scrolls by itself where it is too wide."""
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in heads)))
    body = element("tbody", *(
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ))  # fmt: skip
    inner = element("table", element("caption", title) if caption else None, head, body)
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=title)


def pairs(title: str, values: dict[str, str]) -> Element | None:
    """Names and values, as a list that also fits a phone."""
    if not values:
        return None
    items = [element("div", element("dt", name), element("dd", value)) for name, value in values.items()]
    return element("div", element("h3", title), element("dl", *items))


def fold(summary: str, content: Element | None) -> Element:
    """What is shown only when asked for."""
    return element("details", element("summary", summary), content)


def number(value: float | None, digits: int = 4) -> str:
    """As text; a dash for what was not measured."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}g}"


def _marked(block: str, blocks: Sequence[str]) -> str:
    return f"{block} (last)" if block == blocks[-1] and len(blocks) > 1 else block


def _hue(index: int, blocks: Sequence[str]) -> float:
    """From violet for the first block to green for those near the last."""
    return 290 - 160 * index / max(len(blocks) - 1, 1)
