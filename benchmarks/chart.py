# SPDX-License-Identifier: Apache-2.0
"""A bar chart as SVG: our time as a part of what the bound allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_ROW = 26
_LABEL = 430
_WIDTH = 420
_TOP = 46
# Beyond twice its bound a bar is cut; its number still tells.
_MOST = 2.0
_MET, _MISSED = "#2e7d32", "#c62828"


class Bar(NamedTuple):
    """`part`: 1 is the bound. `text` stands behind the bar."""

    label: str
    part: float
    text: str


def chart(title: str, bars: Sequence[Bar]) -> str:
    height = _TOP + _ROW * len(bars) + 30
    unit = _WIDTH / _MOST
    bound = _LABEL + unit
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 170}" '
        f'height="{height}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="24" font-size="16">{escape(title)}</text>',
    ]
    for number, bar in enumerate(bars):
        y = _TOP + _ROW * number
        width = max(1.0, min(bar.part, _MOST) * unit)
        colour = _MET if bar.part <= 1 else _MISSED
        lines += [
            f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{_LABEL}" y="{y + 2}" width="{width:.1f}" height="16" fill="{colour}"/>',
            f'<text x="{_LABEL + width + 6:.1f}" y="{y + 14}">{escape(bar.text)}</text>',
        ]
    lines += [
        f'<line x1="{bound}" x2="{bound}" y1="{_TOP - 6}" y2="{height - 26}" stroke="#000000" '
        'stroke-dasharray="4 3"/>',
        f'<text x="{bound}" y="{height - 10}" text-anchor="middle">bound (shorter is better)</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
