# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.manifest import (
    VERSION,
    VERSION_SIGNED,
    ExtentDigest,
    ManifestReader,
    Opening,
    Totals,
    opening_line,
    read_totals,
    totals_line,
)
from vmapipe.vma.sealed import (
    MAGIC,
    PIECE_BYTES,
    SealedReader,
    StoredFile,
    closing_line,
    piece_line,
)
from vmapipe.vma.sealed import opening_line as sealed_opening

STORED = StoredFile(12345, bytes(range(16)), bytes(range(32)))


def lines_of(pieces: list[bytes], stored: StoredFile) -> list[str]:
    total = sum(map(len, pieces))
    return [
        sealed_opening(),
        *(piece_line(index, piece) for index, piece in enumerate(pieces)),
        closing_line(total, stored),
    ]


pieces_of = st.lists(st.binary(min_size=1, max_size=300), max_size=4)
stored_files = st.builds(
    StoredFile,
    st.integers(0, 1 << 50),
    st.binary(min_size=16, max_size=16),
    st.sampled_from([b"", bytes(32)]),
)


@given(pieces_of, stored_files)
def test_what_is_sealed_comes_back_and_any_json_reader_takes_it(
    pieces: list[bytes], stored: StoredFile
) -> None:
    lines = lines_of(pieces, stored)
    reader = SealedReader()
    assert b"".join(map(reader.line, lines)) == b"".join(pieces)
    assert reader.stored == stored
    assert "".join(lines).encode().startswith(MAGIC)
    assert len(json.loads("".join(lines))["sealed"]) == len(pieces)


@given(st.data(), pieces_of)
def test_any_other_line_is_damage(data: st.DataObject, pieces: list[bytes]) -> None:
    lines = lines_of(pieces, STORED)
    number = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[number])))
    change = data.draw(st.text(max_size=3))
    end = data.draw(st.integers(at, min(len(lines[number]), at + 3)))
    changed = lines[number][:at] + change + lines[number][end:]
    reader = SealedReader()
    try:
        found = b"".join(map(reader.line, [*lines[:number], changed, *lines[number + 1 :]]))
    except ArchiveError:
        return
    # What is a line of another content is one; the age file and the digests tell then.
    assert changed == lines[number] or found != b"".join(pieces) or reader.stored != STORED


@pytest.mark.parametrize(
    "text", ["", "{", "], {\n", "x" * (PIECE_BYTES * 2), '"AA=="\n', "[" * 9000]
)
def test_junk_is_refused_wherever_it_comes(text: str) -> None:
    for before in ([], [sealed_opening()], [sealed_opening(), piece_line(0, b"x")]):
        reader = SealedReader()
        for line in before:
            reader.line(line)
        with pytest.raises(ArchiveError):
            reader.line(text)


def test_a_signed_manifest_has_a_sha256_and_no_other_one_has() -> None:
    header = ExtentDigest(12800, bytes(16))
    totals = Totals(0, 12800, 12800, bytes(16), (), file_sha256=bytes(32))
    for version, signed, good in (
        (VERSION_SIGNED, True, True),
        (VERSION_SIGNED, False, False),
        (VERSION, True, False),
        (VERSION, False, True),
    ):
        reader = ManifestReader()
        reader.line(opening_line(Opening(bytes(16), 0, header, version)))
        one = totals if signed else totals._replace(file_sha256=b"")
        assert read_totals(totals_line(one).encode()) == one
        if good:
            assert reader.line(totals_line(one)) == one
        else:
            with pytest.raises(ArchiveError, match="version 3"):
                reader.line(totals_line(one))
