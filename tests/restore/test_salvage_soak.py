# SPDX-License-Identifier: Apache-2.0
"""Archives that are cut or damaged at random: what is called whole is the disk, and what is
listed as missing is exactly that."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.archives import UUID, ClusterAt, archive, extents_of, in_order, manifest
from tests.restore.support import frames_with_table, members, one_frame, restored
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.survey import open_damaged
from vmapipe.restore.job import Options, Result, restore
from vmapipe.restore.targets.plan import plan_folder
from vmapipe.restore.verify.report import JSON_NAME, TEXT_NAME
from vmapipe.restore.verify.verify import verify
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import parse_extent_header

# In `make test`, and as many in `make soak` that both are 500.
SEEDS, SOAK_SEEDS = 30, 470
HEADER_END = 12800


class Case(NamedTuple):
    """Disks, the archive as it was, what became of it, and how it is stored."""

    disks: dict[str, bytes]
    raw: bytes
    damaged: bytes
    has_manifest: bool
    compression: str


def random_disk(chance: random.Random) -> bytes:
    """Some clusters of data, of zeroes, and mixed ones; and an end that fits nothing."""
    kinds: list[Callable[[], bytes]] = [
        lambda: chance.randbytes(CLUSTER_BYTES),
        lambda: bytes(CLUSTER_BYTES),
        lambda: (bytes(4096) + chance.randbytes(4096)) * 8,
    ]
    clusters = [chance.choice(kinds)() for _ in range(chance.randint(0, 40))]
    return b"".join(clusters) + chance.randbytes(chance.randint(1, CLUSTER_BYTES))


def random_order(chance: random.Random, disks: dict[str, bytes]) -> list[ClusterAt]:
    """Disk after disk, or several at a time as when they are read side by side, or wild."""
    order = in_order(disks)
    kind = chance.randrange(3)
    if kind == 0:
        return order
    if kind == 1:
        chance.shuffle(order)
        return order
    queues = [[one for one in order if one.name == name] for name in disks]
    mixed: list[ClusterAt] = []
    while queues := [queue for queue in queues if queue]:
        queue = chance.choice(queues)
        count = chance.randint(1, 20)
        mixed += queue[:count]
        del queue[:count]
    return mixed


def spoilt(chance: random.Random, data: bytes, start: int) -> bytes:
    """One to three things happen to what stands behind `start`."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        if len(out) <= start + 1:
            break
        at = chance.randrange(start, len(out))
        length = chance.choice([1, 512, 4096, 50_000, 300_000])
        match chance.randrange(6):
            case 0:
                del out[at:]
            case 1:
                out[at] ^= 1 << chance.randrange(8)
            case 2:
                out[at : at + length] = chance.randbytes(len(out[at : at + length]))
            case 3:
                out[at : at + length] = bytes(len(out[at : at + length]))
            case 4:
                del out[at : at + length]
            case _:
                out[at:at] = chance.randbytes(length)
    return bytes(out)


def make_case(seed: int) -> Case:
    chance = random.Random(seed)
    disks = {f"disk-{number}": random_disk(chance) for number in range(chance.randint(1, 4))}
    raw = archive(
        disks,
        {"qemu-server.conf": b"memory: 512\n"},
        order=random_order(chance, disks),
        slots=chance.choice([1, 3, 17, 58, 59]),
    )
    compression = chance.choice(["none"] * 3 + ["zstd frames", "zstd", "gzip"])
    start = 0 if chance.random() < 0.2 else HEADER_END
    pack = {"zstd frames": frames_with_table, "zstd": one_frame, "gzip": members}
    if compression == "none":
        damaged = spoilt(chance, raw, start)
    else:
        damaged = spoilt(chance, pack[compression](raw), 200 if start else 0)
    return Case(disks, raw, damaged, chance.random() < 0.6, compression)


def salvage(path: Path, out: Path) -> Result:
    cancel = Cancel()
    try:
        with open_damaged(str(path), cancel, ReadOptions()) as opened:
            return restore(
                opened,
                plan_folder(opened.header, str(out)),
                lambda event: None,
                cancel,
                Options(salvage_folder=str(out)),
            )
    finally:
        cancel.close()


def check_case(case: Case, folder: Path) -> None:
    suffix = {"none": "", "gzip": ".gz"}.get(case.compression, ".zst")
    path = folder / f"vm.vma{suffix}"
    path.write_bytes(case.damaged)
    if case.has_manifest:
        Path(f"{path}.manifest.json").write_bytes(manifest(case.raw))
    out = folder / "out"
    out.mkdir()
    try:
        result = salvage(path, out)
    except ArchiveError:
        # Not one extent is left: then nothing may be left behind either.
        assert list(out.iterdir()) == []
        assert not any_extent_is_left(case)
        return
    names = {state.device.name for state in result.states}
    is_numbered = names != set(case.disks)
    if is_numbered:
        assert names <= {str(number) for number in range(1, len(case.disks) + 1)}
    for state in result.states:
        disk = case.disks[
            f"disk-{int(state.device.name) - 1}" if is_numbered else state.device.name
        ]
        file = (out / f"disk-{state.device.name}.raw").read_bytes()
        if is_numbered and not case.has_manifest:
            assert len(file) % CLUSTER_BYTES == 0
            file, disk = file[: len(disk)], disk[: len(file)]
        assert len(file) == len(disk)
        ranges = listed(out, result, state.device.name)
        check_disk(case, state.state, ranges, file, disk)
        if case.compression == "none" and not is_numbered:
            check_missing(case, state.device.dev_id, ranges)
    if result.damage is not None:
        check_restore_by_name(case, path, result, folder)
        check_verify(path, result)


def any_extent_is_left(case: Case) -> bool:
    if case.compression != "none":
        return False  # who knows
    extents = [case.raw[e.offset : e.offset + 512] for e in extents_of(case.raw)]
    return any(extent in case.damaged for extent in extents)


def listed(out: Path, result: Result, name: str) -> list[tuple[int, int, str]]:
    """The ranges that the salvage's map has of a disk."""
    if result.damage is None:
        return []
    document = json.loads((out / JSON_NAME).read_text())
    assert name in (out / TEXT_NAME).read_text()
    device = next(one for one in document["devices"] if one["name"] == name)
    assert device["range_count"] == len(device["ranges"])
    return [(one["offset"], one["length"], one["state"]) for one in device["ranges"]]


def check_disk(
    case: Case, state: str, ranges: list[tuple[int, int, str]], file: bytes, disk: bytes
) -> None:
    assert (state in ("sound", "unchecked")) == (not ranges)
    good = bytearray(b"\1" * len(disk))
    for offset, length, kind in ranges:
        good[offset : offset + length] = bytes(len(good[offset : offset + length]))
        if kind == "missing":
            assert not file[offset : offset + length].strip(b"\0")
    differs = [
        cluster
        for cluster in range(-(-len(disk) // CLUSTER_BYTES))
        for at in [cluster * CLUSTER_BYTES]
        if file[at : at + CLUSTER_BYTES] != disk[at : at + CLUSTER_BYTES] and any(good[at:][:1])
    ]
    if case.has_manifest or state == "sound":
        assert differs == [], f"clusters {differs} are not as they were, and are not listed"
    # Without a manifest nothing can tell that data was changed; but never more than was damaged.


def check_missing(case: Case, dev_id: int, ranges: list[tuple[int, int, str]]) -> None:
    """Not missing is what stands in whole extents, and nothing whose extent's header is lost."""
    whole: set[int] = set()
    with_header: set[int] = set()
    for extent in extents_of(case.raw):
        header = case.raw[extent.offset : extent.offset + 512]
        numbers = {
            number
            for run in parse_extent_header(header, UUID).runs
            if run.dev_id == dev_id
            for number in range(run.first_cluster, run.first_cluster + run.count)
        }
        if header in case.damaged:
            with_header |= numbers
            if case.raw[extent.offset : extent.offset + extent.total_bytes] in case.damaged:
                whole |= numbers
    missing = {
        number
        for offset, length, kind in ranges
        if kind == "missing"
        for number in range(offset // CLUSTER_BYTES, -(-(offset + length) // CLUSTER_BYTES))
    }
    assert not missing & whole
    everything = range(-(-len(case.disks[f"disk-{dev_id - 1}"]) // CLUSTER_BYTES))
    assert set(everything) - with_header <= missing


def check_restore_by_name(case: Case, path: Path, result: Result, folder: Path) -> None:
    """A whole disk is restored when it is named, and no other one is."""
    for number, state in enumerate(result.states):
        out = folder / f"one-{number}"
        out.mkdir()
        name = state.device.name
        if name not in case.disks:
            return  # the header is lost: without --salvage there are no names
        try:
            restored(path, lambda h, n=name, o=out: plan_folder(h, str(o), [(n, None)]))  # type: ignore[misc]
        except ArchiveError:
            assert not state.is_whole
            assert list(out.iterdir()) == []
        else:
            assert state.is_whole
            got = (out / f"disk-{name}.raw").read_bytes()
            assert not case.has_manifest or got == case.disks[name]


def check_verify(path: Path, result: Result) -> None:
    """`verify` and a salvage have one opinion."""
    cancel = Cancel()
    try:
        report = verify(str(path), lambda event: None, cancel)
    except ArchiveError:
        return  # the header is lost
    finally:
        cancel.close()
    assert not report.ok
    assert [disk.fields() for disk in report.disks] == [s.fields() for s in result.states]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_salvage_tells_the_truth(seed: int, tmp_path: Path) -> None:
    check_case(make_case(seed), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS, SEEDS + SOAK_SEEDS))
def test_a_salvage_of_many_archives_tells_the_truth(seed: int, tmp_path: Path) -> None:
    check_case(make_case(seed), tmp_path)
