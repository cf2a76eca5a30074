"""Line charts as inline SVG: colours come from the page's style, so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from .markup import element

WIDTH, HEIGHT = 360, 230  # shown one to one on a phone, larger elsewhere
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 34
POINT_BUDGET = 2400  # per chart, shared by its lines: a page of many blocks and epochs stays small
DOT_BUDGET = 120
DASHES = (None, "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: For the legend.
        xs: Positions, rising.
        ys: Values; what is not finite is left out.
        hue: Colour, in degrees.
        dash: Which of the dash patterns; 0 is a solid line.
        strong: Drawn thick, in the colour of text, and named at its end.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    hue: float
    dash: int = 0
    strong: bool = False

    def points(self) -> list[tuple[float, float]]:
        """What can be drawn."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]


def line_chart(
    title: str,
    lines: Iterable[Line],
    *,
    x_label: str = "epoch",
    reference: float | None = None,
    zero: bool = False,
    log: bool = False,
) -> Element | None:
    """A figure with its caption and legend, or None where there is nothing to draw.

    Args:
        title: The caption; with the unit.
        lines: The curves, at least one point each to be drawn.
        x_label: Below the horizontal axis.
        reference: Where to draw a dotted horizontal line.
        zero: Let the vertical axis begin at 0, so that lengths compare as the numbers do.
        log: A logarithmic vertical axis instead where the values span more than a factor of 50.
    """
    drawn = [(line, points) for line in lines if (points := line.points())]
    if not drawn:
        return None
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points] + ([] if reference is None else [reference])
    log = log and min(ys) > 0 and max(ys) > 50 * min(ys)
    if zero and not log:
        ys.append(0)
    x_ticks, to_x = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=True)
    y_ticks, to_y = (_log_axis if log else _axis)(min(ys), max(ys), HEIGHT - BOTTOM, TOP)

    parts = [*_grid(x_ticks, y_ticks, to_x, to_y, x_label)]
    if reference is not None:
        parts.append(_stroke([(min(xs), reference), (max(xs), reference)], to_x, to_y, class_="reference"))
    dots = sum(len(points) for _, points in drawn) <= DOT_BUDGET
    for line, points in sorted(drawn, key=lambda item: item[0].strong):  # the strong one on top
        parts.append(_curve(line, _thinned(points, max(POINT_BUDGET // len(drawn), 2)), to_x, to_y, dots=dots))
    summary = "; ".join(f"{line.label} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for line, points in drawn)
    picture = element(
        "svg",
        element("title", f"{title}, by {x_label}"),
        *parts,
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_label=f"Line chart of {title} by {x_label}: {summary}",
    )
    legend = _legend([line for line, _ in drawn]) if len(drawn) > 1 else None
    return element("figure", element("figcaption", title), picture, legend)


def _axis(
    low: float, high: float, start: float, end: float, *, whole: bool = False
) -> tuple[list[float], Callable[[float], float]]:
    """Ticks, and the map from values to positions; values reach from ``start`` to ``end``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.5 if whole else 0.1 * abs(low) or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(round(step), 1)
    ticks = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return ticks, lambda value: start + (value - low) / (high - low) * (end - start)


def _log_axis(low: float, high: float, start: float, end: float) -> tuple[list[float], Callable[[float], float]]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**decade for decade in decades]
    if len(ticks) > 7:
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    _, linear = _axis(decades[0], decades[-1], start, end)
    return ticks, lambda value: linear(math.log10(value))


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_label: str,
) -> Iterable[Element]:
    for tick in y_ticks:
        y = round(to_y(tick), 1)
        yield element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
        yield element("text", f"{tick:.6g}", x=LEFT - 6, y=round(y + 3.5, 1), text_anchor="end")
    for tick in x_ticks:
        x = round(to_x(tick), 1)
        yield element("text", f"{tick:.6g}", x=x, y=HEIGHT - BOTTOM + 15, text_anchor="middle")
    yield element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle")


def _curve(
    line: Line,
    points: Sequence[tuple[float, float]],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    *,
    dots: bool,
) -> Element:
    """One line with its dots, and its name where a pointer rests on it."""
    dash = DASHES[line.dash % len(DASHES)]
    parts = [element("title", f"{line.label}: {points[-1][1]:.6g} at the end")]
    parts.append(_stroke(points, to_x, to_y, stroke_dasharray=dash))
    if dots or len(points) == 1:
        parts += [
            element(
                "circle",
                element("title", f"{line.label}: {y:.6g} ({x:.6g})"),
                cx=round(to_x(x), 1),
                cy=round(to_y(y), 1),
                r=2.2,
            )
            for x, y in points
        ]
    if line.strong:
        parts.append(_name(line.label, [(to_x(x), to_y(y)) for x, y in points]))
    return element("g", *parts, **_color(line))


def _name(label: str, positions: Sequence[tuple[float, float]]) -> Element:
    """The label at the right end of a line, above it, or below where there is no room."""
    text = label if len(label) <= 24 else f"{label[:23]}\N{HORIZONTAL ELLIPSIS}"
    end = positions[-1][0]
    beside = [y for x, y in positions if x >= end - 7 * len(text)]  # about as wide as it is in bold
    above = min(beside) - 6
    y = above if above > TOP + 8 else max(beside) + 14
    return element("text", text, x=round(end, 1), y=round(y, 1), text_anchor="end", class_="name")


def _stroke(
    points: Sequence[tuple[float, float]],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    **attributes: object,
) -> Element:
    positions = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)
    return element("polyline", points=positions, **attributes)


def _legend(lines: Sequence[Line]) -> Element:
    items = []
    for line in lines:
        dash = DASHES[line.dash % len(DASHES)]
        sample = element(
            "svg",
            element("polyline", points="0,5 24,5", stroke_dasharray=dash),
            viewBox="0 0 24 10",
            aria_hidden="true",
            **_color(line),
        )
        items.append(element("li", sample, line.label))
    return element("ul", *items, class_="legend")


def _color(line: Line) -> dict[str, object]:
    return {"class_": "line strong"} if line.strong else {"class_": "line", "style": f"--hue: {line.hue:.0f}"}


def _thinned(points: Sequence[tuple[float, float]], limit: int) -> Sequence[tuple[float, float]]:
    """Evenly chosen points, the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]
