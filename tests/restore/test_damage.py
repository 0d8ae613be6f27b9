# SPDX-License-Identifier: Apache-2.0
"""A damaged archive: one clear error, and nothing left behind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.archives import ClusterAt, archive, extents_of, in_order, manifest, resealed
from tests.restore.support import (
    CONFIGS,
    DISK,
    DISKS,
    contents,
    flipped,
    frames_with_table,
    members,
    one_frame,
    opened,
    restored,
    restored_to,
)
from tests.vma.archives import with_md5
from vmapipe.restore.archive.errors import CompressionError, DigestError
from vmapipe.restore.archive.survey import Gap, survey
from vmapipe.restore.job import Options
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec, plan_folder
from vmapipe.runtime.events import Event
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.errors import (
    ArchiveError,
    CoverageError,
    ExtentError,
    HeaderError,
    NotAnArchiveError,
)

RAW = archive(DISKS, CONFIGS, slots=4)
EXTENTS = extents_of(RAW)


def clusters(*numbers: int) -> list[ClusterAt]:
    return [ClusterAt("a", number) for number in numbers]


HALF = {"a": DISK}
UNKNOWN = archive({"a": DISK}, slots=4)
WRONG: dict[str, tuple[bytes, type[Exception], str]] = {
    "empty": (b"", NotAnArchiveError, "the archive is empty"),
    "something else": (b"\x7fELF" * 10_000, NotAnArchiveError, "not a vma file"),
    "cut in the header": (RAW[:9000], HeaderError, "ends inside its header, after 9000"),
    "a bit in the header": (flipped(RAW, 5000), HeaderError, "checksum is wrong"),
    "header only": (RAW[: EXTENTS[0].offset], CoverageError, "cluster 0 is missing (8 of 8 are)"),
    "cut between extents": (RAW[: EXTENTS[2].offset], CoverageError, "is missing"),
    "cut in an extent header": (
        RAW[: EXTENTS[2].offset + 100],
        ExtentError,
        "ends inside an extent header (100 of 512 bytes)",
    ),
    "cut in an extent's data": (RAW[:-1], ExtentError, "ends inside an extent's data"),
    "a bit in an extent header": (
        flipped(RAW, EXTENTS[1].offset + 300),
        ExtentError,
        "extent header's checksum is wrong",
    ),
    "an extent's magic": (
        flipped(RAW, EXTENTS[1].offset),
        ExtentError,
        "no extent header where one must be",
    ),
    "a byte too many": (RAW + b"x", ExtentError, "ends inside an extent header (1 of 512"),
    "zeroes behind": (RAW + bytes(4096), ExtentError, "no extent header where one must be"),
    "spliced with another": (
        RAW + archive(DISKS, CONFIGS, uuid=b"another archive!")[EXTENTS[0].offset :],
        ExtentError,
        "belongs to another archive",
    ),
    "an extent twice": (
        RAW + RAW[EXTENTS[0].offset : EXTENTS[1].offset],
        CoverageError,
        "comes a second time",
    ),
    "an extent left out": (
        RAW[: EXTENTS[0].offset] + RAW[EXTENTS[1].offset :],
        CoverageError,
        "is missing",
    ),
    "a cluster left out": (
        archive(HALF, order=clusters(0, 1, 2, 4, 5, 6, 7)),
        CoverageError,
        "device 'a': cluster 3 is missing (1 of 8 are)",
    ),
    "a cluster twice": (
        archive(HALF, order=clusters(0, 1, 2, 3, 4, 5, 6, 7, 2)),
        CoverageError,
        "device 'a': cluster 2 comes a second time",
    ),
    "a cluster beyond the end": (
        archive(HALF, order=clusters(*range(8), 8)),
        CoverageError,
        "device 'a': cluster 8 lies beyond its end (8 clusters)",
    ),
    "an unknown device": (
        resealed(
            flipped(UNKNOWN, extents_of(UNKNOWN)[0].offset + 40 + 3), extents_of(UNKNOWN)[0].offset
        ),
        CoverageError,
        "a cluster of device 17, which the header does not list",
    ),
    "vmstate out of order": (
        archive(
            {"vmstate": DISK}, order=[ClusterAt("vmstate", n) for n in (0, 2, 1, 3, 4, 5, 6, 7)]
        ),
        CoverageError,
        "vmstate: cluster 2 where 1 must come",
    ),
}


def failure(source: Path | str, out: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        restored_to(source, out)
    assert contents(out) == {}
    return str(caught.value)


# Two ways for each would take long: every other case comes from a pipe.
@pytest.mark.parametrize("case", WRONG)
def test_damage_is_one_error_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    raw, error, words = WRONG[case]
    path = tmp_path / "vm.vma"
    path.write_bytes(raw)
    piped = list(WRONG).index(case) % 2
    source = f"exec:cat {path}" if piped else path
    assert words in failure(source, tmp_path / "out", error)


@pytest.mark.parametrize("pack", [one_frame, frames_with_table, members])
def test_a_compressed_file_that_is_cut_is_one_error_too(pack: object, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    data = pack(RAW) if callable(pack) else b""
    path.write_bytes(data[: len(data) * 2 // 3])
    failure(path, tmp_path / "out", CompressionError)


@pytest.mark.parametrize("name", ["../evil", "/abs", "nul\0l", ".."])
def test_names_that_leave_the_folder_write_nothing(name: str, tmp_path: Path) -> None:
    # The library refuses to make such archives: change the name in a good one.
    stand_in = "x" * len(name)
    raw = archive({stand_in: DISK})
    header_bytes = extents_of(raw)[0].offset
    patched = raw[:header_bytes].replace(stand_in.encode(), name.encode())
    path = tmp_path / "vm.vma"
    path.write_bytes(with_md5(patched, 32) + raw[header_bytes:])
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    failure(path, out, HeaderError)
    assert {p.name for p in tmp_path.rglob("*")} == {"vm.vma", "deep", "out"}


@pytest.mark.parametrize("piped", [False, True])
def test_damaged_data_is_found_with_a_manifest(tmp_path: Path, piped: bool) -> None:
    path = tmp_path / "vm.vma"
    at = EXTENTS[0].offset + 512 + 100_000
    path.write_bytes(flipped(RAW, at))
    beside = tmp_path / "vm.vma.manifest.json"
    beside.write_bytes(manifest(RAW))
    out = tmp_path / "out"
    out.mkdir()
    options = Options(manifest=str(beside))
    source = f"exec:cat {path}" if piped else path
    with pytest.raises(DigestError) as caught:
        restored(source, lambda header: plan_folder(header, str(out)), options=options)
    assert str(caught.value) == (
        "the data is damaged (its digest is not the manifest's), somewhere in 'drive-scsi0' "
        f"bytes 0..262143 (archive offset {EXTENTS[0].offset})"
    )
    assert contents(out) == {}
    # Who knows better may switch it off.
    result = restored(
        source, lambda header: plan_folder(header, str(out)), options=Options(check_digests=False)
    )
    assert not result.digests_checked


def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    beside = tmp_path / "vm.vma.manifest.json"
    good = manifest(RAW)
    lines = good.splitlines(keepends=True)
    other = archive({"other": DISK}, uuid=b"another archive!")
    longer = archive({**DISKS, "more": DISK}, CONFIGS, slots=4)
    for data, words in {
        b"": "cut off or damaged",
        b"{}\n": "the manifest is damaged",
        good[:-1]: "cut off or damaged",
        b"".join(lines[:3]): "cut off or damaged",
        b"".join([*lines[:2], *lines[3:]]): "the manifest is damaged",
        b"".join(
            [*lines[:2], lines[1].replace(b" [", b",["), *lines[2:]]
        ): "the manifest is damaged",
        manifest(other): "belongs to another archive",
        manifest(longer): "its digest differs",
    }.items():
        beside.write_bytes(data)
        assert words in failure(path, tmp_path / "out", ArchiveError)


def test_an_existing_target_that_was_begun_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(archive(HALF, order=[*in_order(HALF), ClusterAt("a", 3)], slots=8))
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * len(DISK))
    events: list[Event] = []
    plan = Plan({1: TargetSpec(str(target), Kind.EXISTING)})
    # From a pipe: extents are handed out as they come.
    with pytest.raises(CoverageError):
        restored(f"exec:cat {path}", lambda header: plan, hear=events.append)
    notices = [event["text"] for event in events if event["event"] == "notice"]
    assert notices in ([f"{target} now holds an incomplete restore"], [])


def walked(path: Path) -> bool:
    """Whether all of the archive's structure is sound."""
    try:
        with opened(path) as archive:
            coverage = Coverage(archive.header)
            for find in survey(archive, lambda: None):
                if isinstance(find, Gap):
                    return False
                coverage.add(find.extent)
            coverage.finish()
    except ArchiveError:
        return False
    return True


def test_a_flipped_bit_never_gives_another_error_than_ours(tmp_path: Path) -> None:
    """Wherever it is: either it is found, or it is in the data, which nothing covers."""
    chance = random.Random(8)
    small = archive({"a": DISK[: 5 * 65536]}, CONFIGS, slots=3)
    headers = [range(extent.offset, extent.offset + 512) for extent in extents_of(small)]
    path = tmp_path / "vm.vma"
    for _ in range(300):
        at = chance.choice([chance.randrange(len(small)), chance.choice(chance.choice(headers))])
        path.write_bytes(flipped(small, at))
        covered = at < extents_of(small)[0].offset or any(at in header for header in headers)
        assert walked(path) != covered, at
