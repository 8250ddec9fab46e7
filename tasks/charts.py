"""Numbers as text and small SVG charts, as the report and the published pages show them. Pure.

Colours are classes (``c-student``, ``f-teacher``, ...): the page that shows a chart says what they look like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from stillhouse.evaluation.statistics import Estimate


def number(value: float, digits: int = 3) -> str:
    """About three significant digits, a proper minus, no exponent."""
    if not math.isfinite(value):
        return "–"
    decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    # Rounding first and adding 0 leaves no "−0".
    return f"{round(value, min(decimals, 2)) + 0.0:,.{min(decimals, 2)}f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference: with its sign."""
    return ("+" if value > 0 else "") + number(value)


def short(value: float) -> str:
    """``1.5M``, ``200k``, ``50``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def score(value: float) -> str:
    """A normalised score."""
    return f"{value:.2f}".replace("-", "−")


def percent(value: float) -> str:
    """A share; 100 % only where it is."""
    return f"{100 * value:.1f} %" if value < 0.9995 else "100 %"


@dataclass(frozen=True)
class Line:
    """Curves of one kind, one for each seed: ``x [N]`` and ``y [N]`` each; drawn thin, with their mean over it."""

    label: str
    colour: str
    runs: list[tuple[Sequence[float], Sequence[float]]]

    def mean(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean curve on all x that every run reaches."""
        xs = np.unique(np.concatenate([np.asarray(x, np.float64) for x, _ in self.runs]))
        low, high = max(x[0] for x, _ in self.runs), min(x[-1] for x, _ in self.runs)
        xs = xs[(xs >= low) & (xs <= high)]
        return xs, np.mean([np.interp(xs, x, y) for x, y in self.runs], axis=0)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers between ``low`` and ``high``."""
    span = max(high - low, 1e-12)
    for exponent in range(math.floor(math.log10(span / most)), 20):
        for step in (1, 2, 5):
            size = step * 10.0**exponent
            first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
            if last - first < most:
                return [round(i * size, 12) for i in range(first, last + 1)]
    return [low]


def chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    rules: Sequence[tuple[str, float]] = (),
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (340, 214),
    percent: bool = False,
) -> str:
    """A chart as :func:`picture` draws it, with its title, for a page of ours."""
    svg = picture(lines, x_label, rules, y_range, size, percent) or '<p class="note">no curve</p>'
    return f'<figure class="chart"><figcaption>{title}</figcaption>{svg}</figure>'


def picture(
    lines: Sequence[Line],
    x_label: str,
    rules: Sequence[tuple[str, float]] = (),
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (340, 214),
    percent: bool = False,
    style: str = "",
) -> str:
    """Curves as SVG, with horizontal ``rules`` (label, y); labels stand at the lines' ends. Empty where there is no curve.

    Args:
        lines: the curves.
        x_label: under the axis.
        rules: label and height of each.
        y_range: lowest and highest y; by default what the curves need.
        size: width and height.
        percent: whether y is a share.
        style: CSS, for a file of its own.
    """
    width, height = size
    labels = [line.label for line in lines if line.label] + [label for label, _ in rules]
    left, right, top, bottom = 42, 12 + max((6.3 * len(label) for label in labels), default=0), 10, 34
    lines = [line for line in lines if all(len(x) for x, _ in line.runs)]
    values = [v for line in lines for _, y in line.runs for v in y if math.isfinite(v)] + [
        y for _, y in rules
    ]
    if not lines or not values:
        return ""
    low, high = y_range or (min(values), max(values))
    if y_range is None:
        pad = 0.06 * (high - low) or max(1.0, abs(high) * 0.1)
        low, high = low - pad, high + pad
    end = max(float(x[-1]) for line in lines for x, _ in line.runs) or 1.0

    def sx(x: float) -> float:
        return left + (width - left - right) * x / end

    def sy(y: float) -> float:
        return top + (height - top - bottom) * (1 - (min(max(y, low), high) - low) / (high - low))

    def path(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> str:
        points = [(sx(float(a)), sy(float(b))) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points) if points else ""

    parts = []
    for y in ticks(low, high, 5):
        text = f"{100 * y:.0f} %" if percent else short(y)
        parts.append(f'<path class="grid" d="M{left} {sy(y):.1f}H{width - right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 7}" y="{sy(y) + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    for x in ticks(0, end, 6):
        parts.append(
            f'<text class="tick" x="{sx(x):.1f}" y="{height - bottom + 15}" text-anchor="middle">{short(x)}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    ends: list[tuple[float, str, str]] = []
    for label, y in rules:
        parts.append(f'<path class="rule" d="M{left} {sy(y):.1f}H{width - right:.1f}"/>')
        ends.append((sy(y), label, "rule-label"))
    for line in lines:
        mean_x, mean_y = line.mean()
        if len(line.runs) > 1:
            parts += [f'<path class="run c-{line.colour}" d="{path(x, y)}"/>' for x, y in line.runs]
        parts.append(f'<path class="mean c-{line.colour}" d="{path(mean_x, mean_y)}"/>')
        if line.label and len(mean_y):
            ends.append((sy(float(mean_y[-1])), line.label, f"f-{line.colour}"))
    for y, label, kind in apart(ends, 13, top + 4, height - bottom):
        parts.append(
            f'<text class="label {kind}" x="{width - right + 6:.1f}" y="{y + 4:.1f}">{escape(label)}</text>'
        )
    alone = f' xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"' if style else ""
    style = f"<style>{style}</style>" if style else ""
    return (
        f'<svg{alone} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(x_label)} and curves">'
        f"{style}{''.join(parts)}</svg>"
    )


def apart(
    ends: list[tuple[float, str, str]], gap: float, top: float, bottom: float
) -> list[tuple[float, str, str]]:
    """Labels moved so that neighbours stand ``gap`` apart, inside ``top..bottom`` and in their order."""
    placed: list[tuple[float, str, str]] = []
    for y, label, kind in sorted(ends):
        placed.append((max(y, placed[-1][0] + gap if placed else top), label, kind))
    for i in range(len(placed) - 1, -1, -1):
        limit = bottom if i == len(placed) - 1 else placed[i + 1][0] - gap
        placed[i] = (min(placed[i][0], limit), *placed[i][1:])
    return placed


@dataclass(frozen=True)
class Strip:
    """The scale on which scores stand between random play (0) and the teacher (1)."""

    low: float
    high: float
    width: int = 190

    def x(self, value: float) -> float:
        """Where a score stands; what lies outside stands at the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return 6 + (self.width - 12) * share

    def head(self) -> str:
        """The two ends' names, above their ticks."""
        return (
            f'<svg class="ends" viewBox="0 0 {self.width} 14" role="img" aria-label="from random to teacher">'
            f'<text x="{self.x(0) - 1:.1f}" y="11">random</text>'
            f'<text x="{self.x(1):.1f}" y="11" text-anchor="middle">teacher</text></svg>'
        )

    def cell(self, found: Estimate | None) -> str:
        """A dot per seed; from 5 seeds on the estimate and its interval."""
        if found is None:
            return '<td class="strip"></td>'
        parts = [
            f'<path class="track" d="M{self.x(self.low):.1f} 13H{self.x(self.high):.1f}"/>',
            f'<path class="mark" d="M{self.x(0):.1f} 5V21"/>',
            f'<path class="mark teacher" d="M{self.x(1):.1f} 3V23"/>',
        ]
        dots = found.points
        if found.interval is not None:
            start, end = (self.x(value) for value in found.interval)
            parts.append(f'<path class="interval" d="M{start:.1f} 13H{end:.1f}"/>')
            dots = (found.value,)
        parts += [f'<circle class="dot" cx="{self.x(dot):.1f}" cy="13" r="4.5"/>' for dot in dots]
        label = f"normalised score {score(found.value)}"
        return (
            f'<td class="strip"><svg viewBox="0 0 {self.width} 26" role="img" aria-label="{label}">'
            f"{''.join(parts)}</svg></td>"
        )
