# SPDX-License-Identifier: Apache-2.0
"""The manifest says what the archive holds: each digest is computed again, the plain way."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from tests.archiver.extents import Archive, archive, dense, device, disk, sparse
from tests.archiver.memory import Fault, MemoryOutput
from tests.archiver.outputs.targets import FileTarget
from tests.vma.archives import CTIME_S, UUID, Run
from vmapipe.archiver.outputs.base import Output
from vmapipe.archiver.outputs.compress import Compression, ZstdOutput
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.manifests import (
    DigestedOutput,
    Digests,
    ManifestFile,
    ManifestLines,
    beside,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.runtime.errors import Failure
from vmapipe.vma.header import Device
from vmapipe.vma.manifest import ExtentDigest, ManifestReader, Opening, Totals


class Manifest(NamedTuple):
    opening: Opening
    extents: list[ExtentDigest]
    totals: Totals


def parse(text: str) -> Manifest:
    reader = ManifestReader()
    opening, *extents, totals = [reader.line(line) for line in text.splitlines(keepends=True)]
    assert isinstance(opening, Opening)
    assert isinstance(totals, Totals)
    return Manifest(opening, [e for e in extents if isinstance(e, ExtentDigest)], totals)


def write(made: Archive, output: Output, digests: Digests) -> None:
    digests.begin(made.header, made.raw_header)
    output.write([made.raw_header])
    for extent in made.extents:
        digests.extents([extent])
        output.write(extent.buffers)


def manifest_of(made: Archive, inner: Output | None = None) -> Manifest:
    lines: list[str] = []
    digests = Digests(ManifestLines(lines.append))
    output = DigestedOutput(inner or MemoryOutput(), digests)
    write(made, output, digests)
    output.commit()
    assert all(line.endswith("\n") for line in lines)
    return parse("".join(lines))


def device_digest(runs: list[Run], dev_id: int) -> bytes:
    """By its definition: mask and stored blocks of each cluster, in order of the clusters."""
    clusters = [c for run in runs for c in run.clusters() if c.dev_id == dev_id]
    clusters.sort(key=lambda cluster: cluster.num)
    return xxh3_128(b"".join(c.mask.to_bytes(2, "big") + c.data for c in clusters)).digest()


MASKS = [0xFFFF, 0, 0x8001, 0xFFFF, 0, 0, 0x0FF0] * 20


def test_the_first_line_names_the_archive_and_covers_its_header() -> None:
    made = dense(3)
    opening = manifest_of(made).opening
    assert (opening.uuid, opening.ctime_s) == (UUID, CTIME_S)
    digest = xxh3_128(made.raw_header).digest()
    assert opening.header == ExtentDigest(len(made.raw_header), digest)


def test_every_extent_has_the_digest_of_its_bytes_header_included() -> None:
    made = archive(disk(1, MASKS), [device(1, len(MASKS))])
    raw = [b"".join(extent.buffers) for extent in made.extents]
    assert len(raw) > 2
    expected = [ExtentDigest(len(data), xxh3_128(data).digest()) for data in raw]
    assert manifest_of(made).extents == expected


def test_the_totals_are_those_of_the_whole_archive() -> None:
    made = archive(disk(1, MASKS), [device(1, len(MASKS))])
    totals = manifest_of(made).totals
    assert totals.extents == len(made.extents)
    assert totals.archive_bytes == totals.file_bytes == len(made.plain)
    assert totals.file_digest == xxh3_128(made.plain).digest()


def test_the_digest_of_a_compressed_file_is_that_of_its_stored_bytes() -> None:
    lines: list[str] = []
    made = dense(200)
    inner = MemoryOutput()
    digests = Digests(ManifestLines(lines.append))
    output = ZstdOutput(DigestedOutput(inner, digests), Compression())
    write(made, output, digests)
    output.commit()
    totals = parse("".join(lines)).totals
    assert totals.archive_bytes == len(made.plain)
    assert totals.file_bytes == len(inner.data) < len(made.plain)
    assert totals.file_digest == xxh3_128(inner.data).digest()


def test_a_device_in_order_has_a_digest_of_masks_and_blocks() -> None:
    runs = disk(1, MASKS)
    (totals,) = manifest_of(archive(runs, [device(1, len(MASKS), "drive-a")])).totals.devices
    assert totals.digest == device_digest(runs, 1)
    assert (totals.dev_id, totals.name, totals.clusters) == (1, "drive-a", len(MASKS))
    assert totals.size_bytes == len(MASKS) * CLUSTER_BYTES
    assert totals.zero_bytes == sum(4096 * (16 - mask.bit_count()) for mask in MASKS)


def test_a_device_of_zeroes_has_the_digest_of_its_masks() -> None:
    (totals,) = manifest_of(sparse(1000)).totals.devices
    assert totals.digest == xxh3_128(bytes(2000)).digest()
    assert totals.zero_bytes == 1000 * CLUSTER_BYTES


@given(
    st.lists(st.sampled_from([0, 1, 0x8000, 0xFFFF]), min_size=1, max_size=200),
    st.integers(1, 70),
    st.integers(1, 70),
)
def test_a_devices_digest_does_not_depend_on_how_its_clusters_came(
    masks: list[int], step: int, other_step: int
) -> None:
    runs = disk(1, masks, clusters_a_run=step)
    others = disk(2, masks, clusters_a_run=other_step)
    mixed = [r for pair in itertools.zip_longest(runs, others) for r in pair if r]
    made = archive(mixed, [device(1, len(masks)), device(2, len(masks))])
    one, two = manifest_of(made).totals.devices
    assert one.digest == device_digest(runs, 1)
    assert two.digest == device_digest(others, 2)


def test_a_device_out_of_order_has_no_digest_but_all_totals() -> None:
    first, second, *rest = disk(1, MASKS)
    others = disk(2, MASKS)
    made = archive([second, first, *rest, *others], [device(1, len(MASKS)), device(2, len(MASKS))])
    one, two = manifest_of(made).totals.devices
    assert one.digest is None
    assert two.digest == device_digest(others, 2)
    assert (one.clusters, one.zero_bytes) == (two.clusters, two.zero_bytes)


def test_vmstate_has_a_digest_whatever_its_length_was_expected_to_be() -> None:
    runs = disk(1, [0xFFFF] * 5)
    made = archive(runs, [Device(1, "vmstate", 1000 * CLUSTER_BYTES)])
    (totals,) = manifest_of(made).totals.devices
    assert (totals.clusters, totals.digest) == (5, device_digest(runs, 1))


def test_extents_that_come_together_are_hashed_one_by_one() -> None:
    made = archive(disk(1, MASKS), [device(1, len(MASKS))])
    lines: list[str] = []
    digests = Digests(ManifestLines(lines.append))
    output = DigestedOutput(MemoryOutput(), digests)
    digests.begin(made.header, made.raw_header)
    output.write([made.raw_header])
    digests.extents(made.extents)
    output.write([buffer for extent in made.extents for buffer in extent.buffers])
    output.commit()
    assert parse("".join(lines)) == manifest_of(made)


# --- manifest files ---


class Beside(NamedTuple):
    folder: Path
    output: DigestedOutput
    digests: Digests


def open_beside(folder: Path) -> Beside:
    archive_path = str(folder / "vm.vma")
    output = FileOutput(archive_path)
    digests = Digests(ManifestFile(beside(archive_path), replace=True))
    return Beside(folder, DigestedOutput(output, digests), digests)


@pytest.fixture
def both(tmp_path: Path) -> Beside:
    folder = tmp_path / "out"
    folder.mkdir()
    return open_beside(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_lies_beside_the_archive(both: Beside) -> None:
    made = dense(100)
    write(made, both.output, both.digests)
    both.output.commit()
    assert names(both.folder) == ["vm.vma", "vm.vma.manifest.json"]
    text = (both.folder / "vm.vma.manifest.json").read_text()
    assert parse(text) == manifest_of(made)


def test_the_manifest_is_there_before_the_archive_has_its_name(
    both: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    link = os.link

    def note(name: str, other: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        seen.append(names(both.folder))
        link(name, other, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "link", note)
    write(dense(1), both.output, both.digests)
    both.output.commit()
    assert seen[-1] == ["vm.vma.manifest.json", "vm.vma.partial"]


def test_an_abandoned_archive_leaves_no_manifest(both: Beside) -> None:
    write(dense(1), both.output, both.digests)
    both.output.abandon()
    both.output.abandon()
    assert names(both.folder) == []


def test_an_archive_that_does_not_get_its_name_takes_its_manifest_back(both: Beside) -> None:
    write(dense(1), both.output, both.digests)
    (both.folder / "vm.vma").write_bytes(b"precious")
    with pytest.raises(Failure, match="exists"):
        both.output.commit()
    both.output.abandon()
    assert names(both.folder) == ["vm.vma"]


def test_abandoning_after_the_commit_leaves_both_files(both: Beside) -> None:
    write(dense(1), both.output, both.digests)
    both.output.commit()
    both.output.abandon()
    assert names(both.folder) == ["vm.vma", "vm.vma.manifest.json"]


def test_a_stale_manifest_without_its_archive_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "vm.vma.manifest.json").write_text("from a backup that was killed")
    (tmp_path / "vm.vma.manifest.json.partial").write_text("that one, too")
    both = open_beside(tmp_path)
    write(dense(1), both.output, both.digests)
    both.output.commit()
    assert names(tmp_path) == ["vm.vma", "vm.vma.manifest.json"]
    assert parse((tmp_path / "vm.vma.manifest.json").read_text()) == manifest_of(dense(1))


def test_a_manifest_with_a_name_of_its_own_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    with pytest.raises(Failure, match=r"precious\.txt exists"):
        ManifestFile(str(path), replace=False)
    assert path.read_text() == "precious"


def test_a_manifest_that_cannot_be_written_fails_the_archive(
    both: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(dense(1), both.output, both.digests)

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Failure, match=r"vm\.vma\.manifest\.json: No space left on device"):
        both.output.commit()
    both.output.abandon()
    assert names(both.folder) == []


def test_a_failure_of_the_output_comes_through(memory: Callable[..., MemoryOutput]) -> None:
    digests = Digests(ManifestLines(lambda line: None))
    output = DigestedOutput(memory(Fault(1)), digests)
    with pytest.raises(Failure, match="a planned fault"):
        output.write([b"data"])
    output.abandon()


def test_a_long_manifest_is_written_in_pieces(tmp_path: Path) -> None:
    target = FileTarget(tmp_path)
    made = sparse(200_000)
    digests = Digests(ManifestFile(str(tmp_path / "m.json"), replace=False))
    output = DigestedOutput(target.open(), digests)
    digests.begin(made.header, made.raw_header)
    for extent in made.extents:
        digests.extents([extent])
    output.commit()
    manifest = parse((tmp_path / "m.json").read_text())
    assert len(manifest.extents) == sum(e.extents for e in made.extents) == -(-200_000 // 58)
