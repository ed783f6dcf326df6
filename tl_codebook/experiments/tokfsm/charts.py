"""Bar charts as inline SVG, drawn by hand: no script, no font, no library. Colours are those of the page (`page.STYLE`)."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

__all__ = ["DASH", "Bar", "bar_chart", "column_chart", "escape"]

DASH = "–"
"""Stands where there is no value."""
_WIDTH = 460
_ROW, _BAR = 22, 14
_LETTER = 6.9
"""Width of a letter at the size of the charts' text (12.5), generously."""


class Bar(NamedTuple):
    """One bar: its length, and the text beside it."""

    label: str
    value: float | None
    """0 or more; None, NaN and infinity draw no bar."""
    shown: str
    kind: str = "own"
    """``own`` (filled), ``second`` (lighter, with an outline) or ``control`` (an empty, dashed outline): told apart without colour."""
    published: float | None = None
    """Where to put the mark of the published value."""
    note: str = ""
    """Said when the pointer rests on it."""


def escape(value: object) -> str:
    """Return a value as text of HTML, fit for attributes in quotes too; None and what is no finite number give a dash.

    >>> escape("<b>&'"), escape(None), escape(float("nan"))
    ('&lt;b&gt;&amp;&#x27;', '–', '–')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    text = str(value).encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no text
    return html.escape("".join(" " if ord(letter) < 32 and letter not in "\n\t" else letter for letter in text), quote=True)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _scale(largest: float) -> tuple[float, list[float]]:
    """Return the end of an axis from 0, at or above `largest`, and the values to write at it: round numbers, 3 to 6 of them."""
    if largest <= 0:
        return 1.0, [0.0, 0.5, 1.0]
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(step * power for step in (0.2, 0.25, 0.5, 1.0, 2.0) if math.ceil(largest / (step * power) - 1e-9) <= 5)
    n = math.ceil(largest / step - 1e-9)
    return n * step, [i * step for i in range(n + 1)]


def bar_chart(
    title: str, rows: Sequence[Bar | str], *, least: float = 1.0, reference: tuple[float, str] | None = None, percent: bool = False
) -> str:
    """Return horizontal bars, one below the other, on an axis from 0.

    Args:
        title: What a screen reader says of the picture, before the values.
        rows: Bars, and headings of groups of bars as text.
        least: The axis ends here, or further where a bar is longer.
        reference: A value to draw a line at, and what it is.
        percent: Write the axis in percent.
    """
    bars = [row for row in rows if isinstance(row, Bar)]
    lengths = [value for bar in bars for value in (bar.value, bar.published) if value is not None and math.isfinite(value)]
    end, marks = _scale(max([least, *lengths]))
    left = 10 + _LETTER * min(24, max((len(bar.label) for bar in bars), default=0))
    right = 12 + _LETTER * max((len(bar.shown) for bar in bars), default=0)
    plot = _WIDTH - left - right
    top = 20 if reference else 6
    bottom = top + _ROW * len(rows)

    def x(value: float) -> str:
        return _round(left + plot * value / end)

    parts = []
    for mark in marks:
        text = f"{100 * mark:.0f} %" if percent else f"{mark:g}"
        parts.append(f'<line class="grid" x1="{x(mark)}" x2="{x(mark)}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="axis" x="{x(mark)}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    parts += [_one(row, top + _ROW * index, left, plot / end) for index, row in enumerate(rows) if isinstance(row, Bar)]
    if reference:
        at, name = reference
        parts.append(f'<line class="reference" x1="{x(at)}" x2="{x(at)}" y1="{top - 4}" y2="{bottom}"/>')
        parts.append(f'<text class="axis" x="{x(at)}" y="{top - 8}" text-anchor="middle">{escape(name)}</text>')
    heads = [(top + _ROW * index + 16, row) for index, row in enumerate(rows) if isinstance(row, str)]
    parts += [f'<text class="head" x="0" y="{y}">{escape(head)}</text>' for y, head in heads]  # last: above the lines
    told = "; ".join(_told(row) for row in rows)
    return _svg(f"{title}. {told}", bottom + 24, parts)


def _told(row: Bar | str) -> str:
    if isinstance(row, str):
        return row
    return f"{row.label} {row.shown}" + (f" (published {row.published:g})" if row.published is not None else "")


def _one(bar: Bar, y: int, left: float, unit: float) -> str:
    label = bar.label if len(bar.label) <= 24 else bar.label[:23] + "…"
    text = y + 15
    parts = [f"<title>{escape(_told(bar) + (f': {bar.note}' if bar.note else ''))}</title>"]
    parts.append(f'<text class="label" x="{_round(left - 7)}" y="{text}" text-anchor="end">{escape(label)}</text>')
    if bar.value is not None and _known(bar.value):
        width = max(0.0, bar.value * unit)
        parts.append(f'<rect class="bar {escape(bar.kind)}" x="{_round(left)}" y="{y + 4}" width="{width:.3f}" height="{_BAR}" rx="1.5"/>')
    parts.append(f'<text class="value" x="{_WIDTH}" y="{text}" text-anchor="end">{escape(bar.shown or None)}</text>')
    if bar.published is not None and _known(bar.published):
        at = left + bar.published * unit
        parts.append(f'<path class="published" d="M{at:.3f} {y + 1}v{_BAR + 6}m-4 -{_BAR + 6}h8l-4 5z"/>')
    return f"<g>{''.join(parts)}</g>"


def column_chart(
    title: str, values: Sequence[float | None], names: Sequence[str], *, top: float, marked: Collection[int] = (), kind: str = "own"
) -> str:
    """Return upright bars side by side, on an axis from 0 to `top`, with a triangle below those that are marked.

    Args:
        title: What a screen reader says of the picture, before the largest values.
        values: 0 or more.
        names: Of the bars; where there are many, only the marked and some others are written.
        top: End of the axis, and above 0.
        marked: Numbers of the bars that get a triangle.
        kind: As in `Bar`; bars that are not marked are drawn lighter.
    """
    left, above, height = 42, 8, 74
    floor = above + height
    step = (_WIDTH - left) / max(1, len(values))
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _round(floor - height * share)
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="axis" x="{left - 6}" y="{float(y) + 4:g}" text-anchor="end">{100 * top * share:.3g} %</text>')
    every = 1 if len(values) <= 20 else 10 if len(values) <= 100 else math.ceil(len(values) / 10)
    for index, (value, name) in enumerate(zip(values, names, strict=True)):
        x, middle = left + step * index, left + step * (index + 0.5)
        if value is not None and _known(value):
            tall = max(0.0, height * value / top)
            look = f"bar {escape(kind)}" + ("" if index in marked or not marked else " faint")
            parts.append(
                f'<rect class="{look}" x="{x + step * 0.1:.2f}" y="{floor - tall:.3f}" width="{step * 0.8:.2f}" height="{tall:.3f}">'
                f"<title>{escape(name)}: {100 * value:.2f} %</title></rect>"
            )
        if index in marked:
            size = min(4.0, max(2.2, step / 2))
            parts.append(f'<path class="mark" d="M{middle:.2f} {floor + 3}l{size:g} 6h-{2 * size:g}z"/>')
        if index % every == 0:
            parts.append(f'<text class="axis" x="{middle:.2f}" y="{floor + 22}" text-anchor="middle">{escape(name)}</text>')
    order = sorted((i for i, value in enumerate(values) if _known(value)), key=lambda i: -(values[i] or 0.0))[:6]
    told = ", ".join(f"{names[i]} {100 * (values[i] or 0.0):.1f} %" for i in order)
    return _svg(f"{title}. The most probable: {told}", floor + 28, parts)


def _svg(label: str, height: int, parts: Sequence[str]) -> str:
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {height}">{"".join(parts)}</svg>'
