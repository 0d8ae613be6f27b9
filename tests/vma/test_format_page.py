# SPDX-License-Identifier: Apache-2.0
"""The tables and the example of docs/vma-format.md are held against the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vmapipe.clusters import sizes
from vmapipe.restore.targets import files
from vmapipe.vma import header, manifest, seektable
from vmapipe.vma.manifest import ManifestReader

PAGE = (Path(__file__).parents[2] / "docs" / "vma-format.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """The rows of the table below a heading, or of the one that begins with a column title."""
    found = re.search(rf"{title}.*?\n\|[-| ]+\n((?:\|[^\n]*\n)+)", PAGE, re.DOTALL)
    assert found is not None, title
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in found[1].splitlines()]


def test_the_sizes_of_the_page_are_those_of_the_code() -> None:
    ours = {
        name: value
        for name, value in (vars(sizes) | vars(header)).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, int)
    }
    ours["TARGET_SLACK_BYTES"] = files.TARGET_SLACK_BYTES
    del ours["PEEK_BYTES"]  # a struct's size, and no limit
    assert {name: int(value) for name, value, _ in table(r"\| name \|")} == ours


@pytest.mark.parametrize(
    ("title", "size"),
    [
        ("## Header\n", header.HEADER_BYTES),
        ("offset in slot", 32),
        ("## Extent\n", sizes.EXTENT_HEADER_BYTES),
    ],
)
def test_the_fields_of_a_structure_fill_it_without_a_gap(title: str, size: int) -> None:
    at = 0
    for offset, length, _ in table(title):
        assert int(offset) == at
        at += int(length)
    assert at == size


def test_the_offsets_of_the_page_are_those_of_the_code() -> None:
    offsets = {field.partition(":")[0]: int(offset) for offset, _, field in table("## Header\n")}
    assert offsets["header_size"] + 4 == header.PEEK_BYTES
    raw = header.encode_header(
        header.Header(b"U" * 16, 1, (header.Device(1, "d", 5),), (header.Config("c", b"x"),))
    )
    assert raw[offsets["config_names"] + 3] == 1
    assert raw[offsets["config_data"] + 3] == 5
    assert raw[offsets["dev_info"] + 32 + 3] == 8
    assert raw[offsets["dev_info"] + 32 + 15] == 5


def test_the_example_of_a_manifest_is_one() -> None:
    found = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    reader = ManifestReader()
    for line in found[1].splitlines():
        reader.line(line)
    assert reader.close().extents == 2
    assert json.loads(found[1])["version"] == manifest.VERSION
    assert f"No line is longer than {manifest.MAX_LINE_BYTES} characters" in PAGE


def test_the_seek_table_of_the_page_is_that_of_the_code() -> None:
    assert f"at most {seektable.MAX_FRAMES}" in PAGE
    raw = b"".join(seektable.seek_table_ends(0))
    assert raw[:4] == (0x184D2A5E).to_bytes(4, "little")
    assert raw[-4:] == (0x8F92EAB1).to_bytes(4, "little")
