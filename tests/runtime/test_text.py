# SPDX-License-Identifier: Apache-2.0
"""What outsiders call things and say, before a terminal or a log sees it."""

from __future__ import annotations

import ast
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.runtime.text import (
    MAX_LINE_CHARS,
    MAX_NAME_CHARS,
    file_lines,
    human_bytes,
    name_text,
    one_line,
)

ANYTHING = st.text(st.characters(codec=None), max_size=400)


def test_a_files_lines_end_where_unix_programs_end_them_and_nowhere_else() -> None:
    odd = "a\u2028b\x85c\x0cd\x1ee\rf"
    assert file_lines(f"{odd}\n\r\nlast\r\n") == [odd, "", "last"]
    assert file_lines("no end") == ["no end"]
    assert file_lines("") == []


@given(ANYTHING, st.integers(101, 500))
def test_a_line_is_printable_and_within_its_bound_whatever_is_in_it(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


@given(ANYTHING)
def test_an_ordinary_text_is_left_as_it_is(text: str) -> None:
    if text.isprintable():
        assert one_line(text) == text


@given(ANYTHING)
def test_a_name_is_shown_as_python_would_and_can_be_read_back(text: str) -> None:
    shown = name_text(text)
    assert shown.isprintable()
    if len(text) <= MAX_NAME_CHARS:
        assert ast.literal_eval(shown) == text


def test_a_long_text_keeps_its_begin_and_its_end() -> None:
    shown = one_line("the guest agent: " + "\x1b" * 1_000_000 + "; wait for its end")
    assert shown.startswith("the guest agent: \\x1b")
    assert shown.endswith("; wait for its end")
    assert "characters left out" in shown
    assert len(shown) <= MAX_LINE_CHARS


def test_a_byte_that_is_no_letter_is_shown_as_that_byte() -> None:
    assert one_line(os.fsdecode(b"vm\xe4.vma")) == "vm\\xe4.vma"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (4 << 20, "4.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (2048 << 40, "2048.0 TiB"),
    ],
)
def test_sizes_are_told_in_binary_units(size_bytes: int, text: str) -> None:
    assert human_bytes(size_bytes) == text
