# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.clusters.sizes import MAX_DEVICE_BYTES, MAX_EXTENT_BYTES
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.header import HEADER_BYTES, MAX_HEADER_BYTES, Config, Device, Header, encode_header
from vmapipe.vma.manifest import (
    MAX_LINE_BYTES,
    VERSION,
    VERSION_WITH_BASE,
    DeviceTotals,
    ExtentDigest,
    ManifestReader,
    Opening,
    Totals,
    extent_line,
    opening_line,
    read_totals,
    totals_line,
)

DIGEST = bytes(range(16))
LONG_DIGEST = bytes(range(16))


class Manifest(NamedTuple):
    """All that a manifest says."""

    opening: Opening
    extents: list[ExtentDigest]
    totals: Totals

    def lines(self) -> list[str]:
        return [
            opening_line(self.opening),
            *(extent_line(index, extent) for index, extent in enumerate(self.extents)),
            totals_line(self.totals),
        ]


def extent_digests(low: int, high: int) -> st.SearchStrategy[ExtentDigest]:
    return st.builds(ExtentDigest, st.integers(low, high), st.binary(min_size=16, max_size=16))


names = st.one_of(
    st.text(min_size=1, max_size=30),
    st.binary(min_size=1, max_size=30).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)
device_totals = st.builds(
    DeviceTotals,
    dev_id=st.integers(1, 254),
    name=names,
    size_bytes=st.integers(1, MAX_DEVICE_BYTES),
    clusters=st.integers(0, 1 << 32),
    zero_bytes=st.integers(0, MAX_DEVICE_BYTES),
    digest=st.none() | st.binary(min_size=16, max_size=16),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    opening = Opening(
        uuid=draw(st.binary(min_size=16, max_size=16)),
        ctime_s=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        header=draw(extent_digests(HEADER_BYTES + 1, MAX_HEADER_BYTES)),
        version=draw(st.sampled_from((VERSION, VERSION_WITH_BASE))),
    )
    extents = draw(st.lists(extent_digests(512, MAX_EXTENT_BYTES), max_size=8))
    totals = Totals(
        extents=len(extents),
        archive_bytes=opening.header.total_bytes + sum(e.total_bytes for e in extents),
        file_bytes=draw(st.integers(0, 1 << 60)),
        file_digest=draw(st.binary(min_size=16, max_size=16)),
        devices=tuple(draw(st.lists(device_totals, max_size=4))),
        incrementals=draw(st.integers(0, 99)) if opening.version == VERSION_WITH_BASE else 0,
    )
    return Manifest(opening, extents, totals)


def small(extents: int = 2) -> Manifest:
    opening = Opening(bytes(16), 1353949200, ExtentDigest(12800, DIGEST))
    totals = Totals(
        extents=extents,
        archive_bytes=12800 + 512 * extents,
        file_bytes=999,
        file_digest=LONG_DIGEST,
        devices=(DeviceTotals(1, "drive-scsi0", 12345, 1, 0, LONG_DIGEST),),
    )
    return Manifest(opening, [ExtentDigest(512, DIGEST)] * extents, totals)


def read(lines: list[str]) -> list[Opening | ExtentDigest | Totals]:
    reader = ManifestReader()
    said = [reader.line(line) for line in lines]
    assert reader.close() == said[-1]
    return said


@given(manifests())
@settings(max_examples=50)
def test_reading_a_written_manifest_gives_it_back(manifest: Manifest) -> None:
    lines = manifest.lines()
    assert read(lines) == [manifest.opening, *manifest.extents, manifest.totals]
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    assert all(line.isascii() for line in lines)


@given(manifests())
@settings(max_examples=50)
def test_the_whole_manifest_is_one_json_document(manifest: Manifest) -> None:
    document = json.loads("".join(manifest.lines()))
    assert document["format"] == "vmapipe-manifest"
    assert bytes.fromhex(document["uuid"]) == manifest.opening.uuid
    assert [size for size, _ in document["extents"]] == [e.total_bytes for e in manifest.extents]
    assert [d["name"] for d in document["devices"]] == [d.name for d in manifest.totals.devices]


def test_the_lines_may_come_without_their_newlines() -> None:
    read([line.removesuffix("\n") for line in small().lines()])


def test_the_lines_are_those_of_the_specification() -> None:
    assert "".join(small().lines()) == (
        '{"format": "vmapipe-manifest", "version": 1, "algorithm": "xxh3-128", '
        '"uuid": "00000000000000000000000000000000", "ctime": 1353949200, '
        '"header": [12800, "000102030405060708090a0b0c0d0e0f"], "extents": [\n'
        ' [512, "000102030405060708090a0b0c0d0e0f"]\n'
        ',[512, "000102030405060708090a0b0c0d0e0f"]\n'
        '], "extent_count": 2, "archive": {"bytes": 13824}, '
        f'"file": {{"bytes": 999, "digest": "{LONG_DIGEST.hex()}"}}, '
        '"devices": [{"dev_id": 1, "name": "drive-scsi0", "bytes": 12345, "clusters": 1, '
        f'"zero_bytes": 0, "digest": "{LONG_DIGEST.hex()}"}}]}}\n'
    )


# --- damage ---


@given(manifests(), st.data())
@settings(max_examples=80)
def test_one_other_character_anywhere_changes_what_is_said_or_is_refused(
    manifest: Manifest, data: st.DataObject
) -> None:
    lines = manifest.lines()
    number = data.draw(st.integers(0, len(lines) - 1))
    line = lines[number].removesuffix("\n")
    at = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.characters().filter(lambda c: c != line[at]))
    lines[number] = line[:at] + other + line[at + 1 :]
    try:
        assert read(lines) != [manifest.opening, *manifest.extents, manifest.totals]
    except ArchiveError:
        pass


@given(st.lists(st.text(), max_size=4), st.integers(0, 4))
def test_any_text_is_refused_and_nothing_worse(texts: list[str], kept: int) -> None:
    reader = ManifestReader()
    for line in small().lines()[:kept]:
        reader.line(line)
    for text in texts:
        with pytest.raises(ArchiveError):
            reader.line(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.sampled_from(["opening", "extent", "totals"]), st.data())
@settings(max_examples=80)
def test_any_json_in_a_lines_place_is_refused_unless_it_is_what_we_write(
    kind: str, data: st.DataObject
) -> None:
    opening, extent, totals = small(1).lines()
    reader = ManifestReader()
    for line in {"opening": [], "extent": [opening], "totals": [opening, extent]}[kind]:
        reader.line(line)
    document = json.loads(
        {"opening": opening + "]}", "extent": extent, "totals": "{" + totals[3:]}[kind]
    )
    place = st.integers(0, 1) if kind == "extent" else st.sampled_from(sorted(document))
    document[data.draw(place)] = data.draw(json_values)
    text = json.dumps(document)
    line = {"opening": text[:-2], "extent": " " + text, "totals": "], " + text[1:]}[kind] + "\n"
    try:
        said = reader.line(line)
    except ArchiveError:
        return
    assert line == written(said)


def written(said: Opening | ExtentDigest | Totals) -> str:
    match said:
        case Opening():
            return opening_line(said)
        case Totals():
            return totals_line(said)
        case _:
            return extent_line(0, said)


@pytest.mark.parametrize(
    ("number", "old", "new"),
    [
        pytest.param(0, '"version": 1', '"version": 3', id="another version"),
        pytest.param(0, "xxh3-128", "md5", id="another algorithm"),
        pytest.param(0, "vmapipe-manifest", "manifest", id="another format"),
        pytest.param(0, "1353949200", "1353949200.0", id="a time that is no integer"),
        pytest.param(0, "1353949200", "1e400", id="an endless time"),
        pytest.param(0, "1353949200", "NaN", id="a time that is no number"),
        pytest.param(0, "1353949200", "1" * 5000, id="a time of 5000 digits"),
        pytest.param(0, "12800", "12288", id="a header without a table"),
        pytest.param(0, "12800", "524289", id="a header too large"),
        pytest.param(0, "00" * 16, "00" * 15, id="a short uuid"),
        pytest.param(0, "0001", "00 01", id="a space inside a digest"),
        pytest.param(0, "0a0b", "0A0B", id="a digest in capitals"),
        pytest.param(0, '"ctime"', '"x": 1, "ctime"', id="one key more"),
        pytest.param(0, '"ctime"', '"ctime": 5, "ctime"', id="a key twice"),
        pytest.param(1, "512", "511", id="an extent too small"),
        pytest.param(1, "512", "3867137", id="an extent too large"),
        pytest.param(1, "512", "true", id="a size that is a boolean"),
        pytest.param(1, "512", "512.0", id="a size that is no integer"),
        pytest.param(1, "512", "1e999", id="an endless size"),
        pytest.param(1, "0f", "", id="a short digest"),
        pytest.param(1, " [", ",[", id="a comma before the first extent"),
        pytest.param(2, ",[", " [", id="no comma before the second extent"),
        pytest.param(2, "]", ", 1]", id="an extent of three"),
        pytest.param(2, "512", "4608", id="another size than the total says"),
        pytest.param(3, '"extent_count": 2', '"extent_count": 3', id="another count"),
        pytest.param(3, '"extent_count": 2', '"extent_count": 2.0', id="a count no integer"),
        pytest.param(3, "13824", "13825", id="another total"),
        pytest.param(3, "12345", "1e400", id="an endless device"),
        pytest.param(3, '"dev_id": 1', '"dev_id": "1"', id="a dev_id that is text"),
        pytest.param(3, '"drive-scsi0"', "null", id="a device without name"),
        pytest.param(3, "0e0f", "0e", id="a short device digest"),
        pytest.param(3, "]}", "]} ", id="a space at the end"),
        pytest.param(3, "]}\n", '], "incrementals": 3}\n', id="version 1 with a base"),
        pytest.param(3, "]}\n", '], "incrementals": 0}\n', id="no base in many words"),
        pytest.param(3, "\n", "\r\n", id="a carriage return"),
        pytest.param(3, "\n", "\n\n", id="an empty line"),
    ],
)
def test_a_line_that_is_not_as_it_was_written_is_refused(number: int, old: str, new: str) -> None:
    lines = small().lines()
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new)
    with pytest.raises(ArchiveError, match=r"^the manifest is damaged: "):
        read(lines)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"version": 1', '"version": 4', "manifest version 4 is not known here"),
        ("xxh3-128", "md5", "digest algorithm 'md5' is not known here"),
        ("vmapipe-manifest", "manifest", "not a manifest of vmapipe"),
    ],
)
def test_a_manifest_of_another_kind_is_called_so(old: str, new: str, words: str) -> None:
    with pytest.raises(ArchiveError, match=words):
        ManifestReader().line(small().lines()[0].replace(old, new))


def test_nesting_beyond_all_measure_is_refused() -> None:
    reader = ManifestReader()
    reader.line(small().lines()[0])
    with pytest.raises(ArchiveError):
        reader.line("," + "[" * 100_000)


def test_a_missing_extent_line_is_noticed() -> None:
    lines = small(3).lines()
    with pytest.raises(ArchiveError, match=r"2 extents and 13824 bytes, 3 and 14336 announced"):
        read(lines[:3] + lines[4:])


def test_text_after_the_end_is_refused() -> None:
    lines = small().lines()
    with pytest.raises(ArchiveError, match="text after the end"):
        read([*lines, lines[-1]])


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_manifest_without_its_end_proves_nothing(kept: int) -> None:
    reader = ManifestReader()
    for line in small().lines()[:kept]:
        reader.line(line)
    with pytest.raises(ArchiveError, match="ends too early"):
        reader.close()


# --- the longest line ---


def test_the_totals_of_the_largest_header_are_within_the_limit_of_a_line() -> None:
    # As many stray bytes in names as a header holds: JSON makes six characters of each.
    names = [f"{n:03}" + "\udcff" * (2008 if n < 254 else 2000) for n in range(1, 255)]
    devices = tuple(Device(n, name, MAX_DEVICE_BYTES) for n, name in enumerate(names, 1))
    largest = encode_header(Header(bytes(16), 0, devices, (Config("c", b""),)))
    assert MAX_HEADER_BYTES - len(largest) < 1024
    totals = Totals(
        extents=1 << 60,
        archive_bytes=1 << 60,
        file_bytes=1 << 60,
        file_digest=LONG_DIGEST,
        devices=tuple(
            DeviceTotals(d.dev_id, d.name, d.size_bytes, 1 << 32, d.size_bytes, LONG_DIGEST)
            for d in devices
        ),
    )
    assert len(totals_line(totals)) <= MAX_LINE_BYTES


def test_a_line_above_the_limit_is_refused_unparsed() -> None:
    reader = ManifestReader()
    with pytest.raises(ArchiveError, match="characters"):
        reader.line(" " * (MAX_LINE_BYTES + 1))


def test_a_manifest_with_digests_of_clusters_beside_it_is_version_2_and_no_other() -> None:
    opening = Opening(bytes(16), 1, ExtentDigest(12800, bytes(16)), 2)
    totals = Totals(0, 12800, 12800, bytes(16), (), 3, 4112)
    reader = ManifestReader()
    assert reader.line(opening_line(opening)) == opening
    assert '"version": 2' in opening_line(opening)
    assert reader.line(totals_line(totals)) == totals == read_totals(totals_line(totals).encode())
    reader = ManifestReader()
    reader.line(opening_line(opening._replace(version=1)))
    with pytest.raises(ArchiveError, match="digests of clusters in version 1"):
        reader.line(totals_line(totals._replace(incrementals=0)))


@pytest.mark.parametrize("odd", ["null", "[]", '"many"', "{}", "1.5", "true", "-1", "1e999"])
def test_an_odd_number_is_damage_in_words_of_ours(odd: str) -> None:
    totals = Totals(0, 12800, 12800, bytes(16), (), 3, 4112)
    text = totals_line(totals).strip()
    for key in ('"incrementals": 3', '"extent_count": 0', '"bytes": 4112'):
        with pytest.raises(ArchiveError) as caught:
            read_totals(text.replace(key, f"{key.split(':')[0]}: {odd}").encode())
        assert (
            str(caught.value) == "the manifest is damaged: a line that is not as vmapipe writes it"
        )


@pytest.mark.parametrize("text", [b"", b"], {}", b'], "extent_count": 1}', b"x", b"\xff", b"\n\n"])
def test_a_last_line_that_is_none_is_damage(text: bytes) -> None:
    with pytest.raises(ArchiveError, match="manifest is damaged"):
        read_totals(text)


def test_the_last_line_is_read_alone_whatever_stands_before_it() -> None:
    totals = Totals(0, 12800, 12800, bytes(16), (), 3, 4112)
    line = totals_line(totals).encode()
    for before in (b"", b"\n", b"\xff\n", b"half a line, cut anywhere\n", line):
        assert read_totals(before + line) == totals
    with pytest.raises(ArchiveError, match="manifest is damaged"):
        read_totals(line + b"\n")
    with pytest.raises(ArchiveError, match=r"manifest is damaged: a line of .* characters"):
        read_totals(line.rstrip() + b" " * MAX_LINE_BYTES)
