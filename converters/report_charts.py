"""Charts of a report as SVG, drawn with no library: one cell per tensor, bars, shares. Knows numbers, no models.

Colours are CSS variables of the page (`report_page`), so that a chart is right on a light and on a dark ground. Text of
a file never gets into a chart unescaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LABEL, _CELL_HEIGHT, _GAP, _TEXT = 128, 24, 2, 15  # of a grid, in pixels
_WIDTH = 960


@dataclass(frozen=True)
class Cell:
    """One tensor of a grid: strength of its colour (0 to 1), what is written in it, and what a pointer shows."""

    strength: float
    label: str
    title: str


def grid(rows: Mapping[str, Mapping[int, Cell]], n_columns: int, name: str) -> str:
    """Cells in rows of a name and columns of a number; name: of the chart, for those who do not see it."""
    width = (_WIDTH - _LABEL) / max(1, n_columns)
    height = len(rows) * _CELL_HEIGHT + 2 * _TEXT
    parts = []
    for i, (label, cells) in enumerate(rows.items()):
        y = i * _CELL_HEIGHT
        parts.append(f'<text x="{_LABEL - 8}" y="{y + 16}" class="end">{escape(label)}</text>')
        for column, cell in cells.items():
            x = _LABEL + column * width
            parts.append(_cell(cell, x, y, width - _GAP, _CELL_HEIGHT - _GAP))
    step = max(1, round(36 / width))
    y = len(rows) * _CELL_HEIGHT + _TEXT
    ticks = (
        f'<text x="{_LABEL + (c + 0.5) * width:.1f}" y="{y}" class="mid">{c}</text>' for c in range(0, n_columns, step)
    )
    return _svg(height, name, [*parts, *ticks, f'<text x="{_LABEL - 8}" y="{y}" class="end faint">layer</text>'])


def _cell(cell: Cell, x: float, y: float, width: float, height: float) -> str:
    strength = min(max(cell.strength, 0.0), 1.0)
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" rx="3"'
    box = f'<rect {shape} class="cell" fill-opacity="{0.06 + 0.94 * strength:.3f}"/>'
    text = ""
    if cell.label and width > 6.2 * len(cell.label) + 4:
        ink = "on" if strength > 0.66 else "off"
        text = f'<text x="{x + width / 2:.1f}" y="{y + 15:.1f}" class="mid {ink}">{escape(cell.label)}</text>'
    return f"<g><title>{escape(cell.title)}</title>{box}{text}</g>"


def bars(values: Sequence[float], name: str, show: Callable[[float], str], x_label: str, height: int = 170) -> str:
    """A bar for each value, over its number; the largest and the middle of the scale are written beside it."""
    top, floor = max(max(values, default=0.0), 1e-12), height - 2 * _TEXT
    width = (_WIDTH - _LABEL) / max(1, len(values))
    parts = []
    for share in (0.5, 1.0):
        y = floor - share * (floor - _TEXT)
        parts.append(f'<line x1="{_LABEL}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{_LABEL - 8}" y="{y + 4:.1f}" class="end">{escape(show(share * top))}</text>')
    step = max(1, round(36 / width))
    for i, value in enumerate(values):
        tall = value / top * (floor - _TEXT)
        x = _LABEL + i * width
        parts.append(
            f'<g><title>{escape(f"{x_label} {i}: {show(value)}")}</title><rect x="{x:.1f}" y="{floor - tall:.1f}" '
            f'width="{max(width - _GAP, 1):.1f}" height="{tall:.1f}" rx="2" class="bar"/></g>'
        )
        if i % step == 0:
            parts.append(f'<text x="{x + width / 2:.1f}" y="{floor + _TEXT}" class="mid">{i}</text>')
    parts.append(f'<text x="{_LABEL - 8}" y="{floor + _TEXT}" class="end faint">{escape(x_label)}</text>')
    return _svg(height - _TEXT, name, parts)


def shares(values: Mapping[str, float], name: str, show: Callable[[float], str]) -> str:
    """Parts of a whole, side by side, the largest first, each with its name below."""
    whole = sum(values.values()) or 1.0
    x, parts, legend_x, legend_y = 0.0, [], 0.0, 58.0
    for i, (label, value) in enumerate(sorted(values.items(), key=lambda item: -item[1])):
        width = value / whole * _WIDTH
        text = f"{label}  {show(value)}  {value / whole:.1%}"
        parts.append(
            f'<g><title>{escape(text)}</title><rect x="{x:.1f}" y="0" width="{max(width - _GAP, 1):.1f}" height="30" '
            f'rx="3" class="s{i % 8}"/></g>'
        )
        need = 6.6 * len(text) + 40
        if legend_x + need > _WIDTH:
            legend_x, legend_y = 0.0, legend_y + 22
        parts.append(f'<rect x="{legend_x:.1f}" y="{legend_y - 10}" width="11" height="11" rx="2" class="s{i % 8}"/>')
        parts.append(f'<text x="{legend_x + 17:.1f}" y="{legend_y}">{escape(text)}</text>')
        legend_x += need
        x += width
    return _svg(int(legend_y) + 8, name, parts)


def _svg(height: int, name: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
