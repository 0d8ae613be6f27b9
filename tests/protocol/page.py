# SPDX-License-Identifier: Apache-2.0
"""docs/wire-protocol.md, read by the tests that hold the code to it.

An example is a fenced block marked `wire`. Its first line is the message as a
person writes it; then each part begins with a line `part N: …`, followed by
its bytes in hex, where `5a*3` is a byte three times and `|` begins a comment.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire-protocol.md").read_text(encoding="utf-8")


class Example(NamedTuple):
    """One `wire` block."""

    text: str
    parts: list[bytes]


def unhex(text: str) -> bytes:
    """`aa*3 0102` to bytes."""
    out = b""
    for token in text.split():
        digits, _, times = token.partition("*")
        out += bytes.fromhex(digits) * int(times or 1)
    return out


def read_examples(mark: str) -> Iterator[Example]:
    for block in re.findall(rf"^```{mark}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        head, *lines = block.splitlines()
        parts: list[bytes] = []
        for line in lines:
            if line.startswith(f"part {len(parts)}: "):
                parts.append(b"")
            else:
                assert line.startswith("  "), line
                parts[-1] += unhex(line.partition("|")[0])
        yield Example(head, parts)


def literal(text: str) -> Any:
    """The page's notation as a value: JSON, and h'…' for bytes."""
    text = re.sub(r"h'([^']*)'", lambda found: repr(unhex(found[1])), text)
    return ast.literal_eval(re.sub(r"\b(true|false)\b", lambda found: found[0].title(), text))


def table(first_column: str) -> list[list[str]]:
    """The rows of all tables whose first column has this title, header rows left out."""
    rows = []
    for found in re.finditer(
        rf"^\| {first_column} \|.*\n\|[-| ]*\n((?:\|.*\n)+)", PAGE, re.MULTILINE
    ):
        rows += [[cell.strip() for cell in row[1:-1].split("|")] for row in found[1].splitlines()]
    return rows
