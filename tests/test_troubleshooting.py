# SPDX-License-Identifier: Apache-2.0
"""docs/operations/troubleshooting.md, held to the texts in the code: each heading is one of them."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.test_house import ROOMS, python_files, tree_of

PAGE = Path(__file__).parent.parent / "docs" / "operations" / "troubleshooting.md"
# What stands in for a name, a number or the system's reason, in headings as in templates.
_ANY = "\0"
# One template has such a share of a heading's letters, in runs of at least so many: the rest may be filled in.
_RUN, _SHARE = 8, 0.6
# Values of placeholders that headings show; and what other programs say.
_FILLED_IN = (
    "No such file or directory",
    "No space left on device",
    "Too many open files",
    "SIGKILL",
    "a FIFO (a folder, a socket, a device)",
)
# Headings whose message the code puts together from several texts: each piece is one of the code.
_PUT_TOGETHER = {
    "cannot use the bucket of s3://…": ("cannot ", "use the bucket of"),
    "QEMU's … event is not valid": ("'s ", " event", " is not valid"),
    "it is the backing file of …, not a disk: name …": (
        "it is ",
        "the backing file",
        ", not a disk: name ",
    ),
    "hook backup-start failed: exit code 1": ("hook ", "backup-start", " failed: ", "exit code "),
    "hook backup-start: not done within 300 s, so it was ended": (
        "hook ",
        "backup-start",
        ": not done within ",
        " s, so it was ended",
    ),
}
_FOREIGN = {
    "Is another process using the image",
    "If the actual block size of the target exceeds this default, the backup may be unusable",
}


def _headings() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [line[4:] for line in lines if line.startswith("### ")]
    parts = [part for text in found for part in text.split(" / ")]
    return [re.sub(r" \[[a-z-]+\]$", "", part) for part in parts]


def _template(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_template(value) for value in values)
        case ast.BinOp(op=ast.Add()):
            return _template(node.left) + _template(node.right)
    return _ANY


@functools.cache
def _templates() -> list[str]:
    """Every text of the product, with placeholders as _ANY."""
    notes = {
        node.value
        for file in python_files(*ROOMS)
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Expr)
    }
    found = {
        _template(node)
        for file in python_files(*ROOMS)
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and node not in notes
    }
    return [text for text in found if len(text) > _RUN]


@functools.cache
def _templates_by_run() -> dict[str, set[int]]:
    """Every run of letters, and the numbers of the templates that have it."""
    found: dict[str, set[int]] = {}
    for number, text in enumerate(_templates()):
        for at in range(len(text) - _RUN + 1):
            found.setdefault(text[at : at + _RUN], set()).add(number)
    return found


def _is_said(heading: str) -> bool:
    """Tell whether one template has most of a heading's letters, in runs of some length."""
    if heading in _PUT_TOGETHER:
        pieces = _PUT_TOGETHER[heading]
        in_order = re.search(".*?".join(map(re.escape, pieces)), heading)
        return bool(in_order) and all(any(p in t for t in _templates()) for p in pieces)
    text = re.sub("|".join(["…", r"\d+", *map(re.escape, _FILLED_IN)]), _ANY, heading)
    exact = re.compile("[^\\n]*?".join(map(re.escape, text.split(_ANY))))
    if any(exact.search(template) for template in _templates()):
        return True
    covered: dict[int, set[int]] = {}
    for at in range(len(text) - _RUN + 1):
        run = text[at : at + _RUN]
        for number in () if _ANY in run else _templates_by_run().get(run, ()):
            covered.setdefault(number, set()).update(range(at, at + _RUN))
    fixed = len(text.replace(_ANY, ""))
    return max(map(len, covered.values()), default=0) >= _SHARE * fixed


@pytest.mark.parametrize("heading", ["cannot find the moon", "the guest was eaten by a whale"])
def test_a_text_that_is_not_in_the_code_is_found_out(heading: str) -> None:
    assert not _is_said(heading)


def test_every_heading_is_a_text_of_the_code() -> None:
    assert set(_PUT_TOGETHER) <= set(_headings())
    unsaid = [text for text in _headings() if text not in _FOREIGN and not _is_said(text)]
    assert unsaid == []
