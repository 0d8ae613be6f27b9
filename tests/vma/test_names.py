# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.vma.errors import HeaderError
from vmapipe.vma.names import is_unsafe, printable, safe_file_name

HOSTILE = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "../evil.conf",
    "a/b",
    "a/../../b",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "a\x7f",
    "a\x9bm",
    "x" * 256,
    "é" * 128,
    "\ud800",
]
any_text = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused(name: str) -> None:
    with pytest.raises(HeaderError, match=r"^config 'x' has "):
        safe_file_name(name, "config 'x'")


@pytest.mark.parametrize(
    "name",
    ["qemu-server.conf", "...", "a b", "-rf", "é" * 127, "x" * 255, "caf\udce9", "a\\b", "a\xa0b"],
)
def test_a_harmless_name_stays_as_it_is(name: str) -> None:
    assert safe_file_name(name, "config") == name


def test_prefix_and_suffix_count_towards_the_length() -> None:
    assert safe_file_name("x" * 246, "it", prefix="disk-", suffix=".raw") == f"disk-{'x' * 246}.raw"
    with pytest.raises(HeaderError, match="too long"):
        safe_file_name("x" * 247, "it", prefix="disk-", suffix=".raw")


@given(any_text, st.sampled_from(["", "disk-"]), st.sampled_from(["", ".raw"]))
def test_whatever_is_taken_names_a_file_in_the_folder_itself(
    name: str, prefix: str, suffix: str
) -> None:
    try:
        file_name = safe_file_name(name, "it", prefix=prefix, suffix=suffix)
    except HeaderError:
        return
    assert file_name == prefix + name + suffix
    path = os.path.normpath(os.path.join("/target", file_name))
    assert os.path.dirname(path) == "/target"
    assert os.path.basename(path) == file_name
    assert 0 < len(os.fsencode(file_name)) <= 255
    assert not is_unsafe(name)


@given(any_text)
def test_a_printable_name_never_steers_a_terminal(name: str) -> None:
    shown = printable(name)
    assert shown.isprintable()
    if name.isprintable():
        assert shown == name


def test_printable_shows_what_was_there() -> None:
    assert printable("a\x1b[2J\udce9\u202eb") == "a\\x1b[2J\\udce9\\u202eb"
