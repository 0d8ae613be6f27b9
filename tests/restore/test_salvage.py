# SPDX-License-Identifier: Apache-2.0
"""What is whole of a damaged archive is restored; of the rest, what there is, and a map of what not."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from tests.archives import ClusterAt, archive, extents_of, in_order, manifest
from tests.machine import VMA, Need, bad, good, run
from tests.restore.support import CHANCE, a_cancel, contents, flipped, frames_with_table, lzop
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.survey import open_damaged
from vmapipe.restore.job import Options, restore
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec
from vmapipe.restore.verify.report import JSON_NAME, TEXT_NAME, Report
from vmapipe.restore.verify.verify import VerifyOptions, verify
from vmapipe.vma.header import Config, Device, Header, encode_header

A = CHANCE.randbytes(10 * CLUSTER_BYTES)
B = CHANCE.randbytes(8 * CLUSTER_BYTES + 5000)
DISKS = {"a": A, "b": B}
CONFIGS = {"qemu-server.conf": b"memory: 512\n"}
# Disk after disk, two clusters an extent: the fifth extent is the last one of `a`.
RAW = archive(DISKS, CONFIGS, slots=2)
ROOT = Path(__file__).parents[2]
EXTENTS = extents_of(RAW)
IN_A, IN_B = EXTENTS[2], EXTENTS[7]
# Both in each extent.
MIXED = archive(
    DISKS,
    slots=4,
    order=[
        one for pair in zip(in_order({"a": A}), in_order({"b": B}), strict=False) for one in pair
    ]
    + [ClusterAt("a", 9)],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.vma"


def store(path: Path, raw: bytes, digests: bytes | None = None) -> None:
    path.write_bytes(raw)
    if digests is not None:
        Path(f"{path}.manifest.json").write_bytes(digests)


def salvage_map(folder: Path) -> dict[str, dict[str, object]]:
    """Each device of the map by its name."""
    document = json.loads((folder / JSON_NAME).read_text())
    assert (document["format"], document["version"]) == ("vmapipe-salvage", 1)
    assert (folder / TEXT_NAME).read_text().endswith("\n")
    return {device["name"]: device for device in document["devices"]}


def ranges(device: dict[str, object]) -> list[tuple[int, int, str]]:
    found = device["ranges"]
    assert isinstance(found, list)
    return [(one["offset"], one["length"], one["state"]) for one in found]


def states(source: Path | str, **more: object) -> dict[str, tuple[str, str | None]]:
    report = report_of(source, **more)
    return {disk.device.name: (disk.state, disk.checked_by) for disk in report.disks}


def report_of(source: Path | str, **more: object) -> Report:
    with a_cancel() as cancel:
        return verify(str(source), lambda event: None, cancel, VerifyOptions(**more))  # type: ignore[arg-type]


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize("piped", [False, True])
def test_a_whole_disk_of_a_cut_archive_is_restored_by_its_name(
    path: Path, tmp_path: Path, has_manifest: bool, piped: bool
) -> None:
    store(path, RAW[: IN_B.offset + 700], manifest(RAW) if has_manifest else None)
    source = f"exec:cat {path}" if piped else path
    more = ["--manifest", f"{path}.manifest.json"] if has_manifest else []
    told = good("restore", source, tmp_path / "out", "--device", "a", *more).decode()
    assert contents(tmp_path / "out") == {"disk-a.raw": A, **CONFIGS}
    assert "the archive is damaged; what is restored of it is whole: 'a'" in told
    assert "device 'b': incomplete" in told
    assert ("every byte checked" in told) == has_manifest or "not every byte" in told
    text = bad("restore", source, tmp_path / "other", "--device", "b", *more)
    assert "device 'b': incomplete: " in text
    assert not (tmp_path / "other").exists()


def test_a_restore_of_everything_refuses_and_names_what_is_whole(
    path: Path, tmp_path: Path
) -> None:
    for raw, digests, words in (
        (RAW[: IN_B.offset], None, "device 'b': cluster 4 is missing (5 of 9 are)"),
        (flipped(RAW, IN_B.offset + 5000), manifest(RAW), "its digest is not the manifest's"),
        (flipped(RAW, IN_B.offset + 300), manifest(RAW), "extent header's checksum is wrong"),
    ):
        store(path, raw, digests)
        for source in (path, f"exec:cat {path}"):
            more = ["--manifest", f"{path}.manifest.json"] if digests else []
            text = bad("restore", source, tmp_path / "out", *more)
            assert words in text
            assert "whole are 'a': restored when only they are named (--device NAME)" in text
            assert "vmapipe restore --salvage" in text
            assert not (tmp_path / "out").exists()
        done = run("extract", path, tmp_path / "out", tool=VMA)
        assert done.returncode == 1
        assert b"whole are 'a'" in done.stderr
        assert not (tmp_path / "out").exists()
        assert run("extract", path, "-d", "a", tmp_path / "out", tool=VMA).returncode == 0
        assert (tmp_path / "out" / "disk-a.raw").read_bytes() == A
        subprocess.run(["rm", "-r", tmp_path / "out"], check=True)


def test_a_map_that_skips_the_damaged_disk_is_carried_out(path: Path, tmp_path: Path) -> None:
    store(path, RAW[: IN_B.offset])
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * len(A))
    lines = tmp_path / "map"
    lines.write_text(f"format=raw:1:a={target}\nskip=b\n")
    good("restore", path, tmp_path / "out", "--map", lines)
    assert target.read_bytes() == A
    lines.write_text(f"format=raw:1:b={target}\nskip=a\n")
    assert "device 'b'" in bad("restore", path, tmp_path / "out2", "--map", lines)


def test_of_an_extent_of_two_disks_the_one_whose_data_is_right_is_sound(
    path: Path, tmp_path: Path
) -> None:
    extent = extents_of(MIXED)[2]
    # The extent's clusters are a, b, a, b: the first one's data is a's.
    damaged = flipped(MIXED, extent.offset + 512 + 100)
    store(path, damaged, manifest(MIXED))
    assert states(path)["a"][0] == "damaged"
    assert states(path)["b"] == ("sound", "manifest")
    report = report_of(path)
    assert {find.device for find in report.damage} == {"a"}
    for source in (path, f"exec:cat {path}"):
        more = ["--manifest", f"{path}.manifest.json"]
        assert states(source, manifest=more[1])["b"] == ("sound", "manifest")
        told = good("restore", source, tmp_path / "out", "--device", "b", *more).decode()
        assert "every byte checked" in told
        assert (tmp_path / "out" / "disk-b.raw").read_bytes() == B
        (tmp_path / "out" / "disk-b.raw").unlink()
        assert "device 'a': damaged" in bad(
            "restore", source, tmp_path / "o", "--device", "a", *more
        )


def test_a_salvage_restores_what_there_is_and_lists_the_rest(path: Path, tmp_path: Path) -> None:
    # A header of `a` is lost, and b is cut off.
    raw = flipped(RAW[: IN_B.offset], IN_A.offset + 60)
    store(path, raw, manifest(RAW))
    out = tmp_path / "out"
    text = bad("restore", "--salvage", "--quiet", path, out, code=4)
    assert "restored is what there is of it, and 2 of 2 devices are not whole" in text
    assert text.endswith(f"see {out}/{TEXT_NAME}")
    found = salvage_map(out)
    lost = (4 * CLUSTER_BYTES, 2 * CLUSTER_BYTES, "missing")
    assert ranges(found["a"]) == [lost]
    assert ranges(found["b"]) == [(4 * CLUSTER_BYTES, len(B) - 4 * CLUSTER_BYTES, "missing")]
    assert (found["a"]["state"], found["a"]["missing_bytes"]) == ("incomplete", 2 * CLUSTER_BYTES)
    a = (out / "disk-a.raw").read_bytes()
    assert a == A[: 4 * CLUSTER_BYTES] + bytes(2 * CLUSTER_BYTES) + A[6 * CLUSTER_BYTES :]
    b = (out / "disk-b.raw").read_bytes()
    assert b == B[: 4 * CLUSTER_BYTES] + bytes(len(B) - 4 * CLUSTER_BYTES)
    assert (out / "qemu-server.conf").read_bytes() == CONFIGS["qemu-server.conf"]
    assert "missing bytes 262144..393215 (131072)" in (out / TEXT_NAME).read_text()


def test_damaged_data_is_restored_as_it_is_and_listed(path: Path, tmp_path: Path) -> None:
    raw = flipped(RAW, IN_A.offset + 5000)
    store(path, raw, manifest(RAW))
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out", code=4)
    found = salvage_map(tmp_path / "out")
    assert ranges(found["a"]) == [(4 * CLUSTER_BYTES, 2 * CLUSTER_BYTES, "damaged")]
    assert (found["a"]["state"], found["b"]["state"]) == ("damaged", "sound")
    a = (tmp_path / "out" / "disk-a.raw").read_bytes()
    assert a != A
    assert a == flipped(A, 4 * CLUSTER_BYTES + 5000 - 512)
    assert (tmp_path / "out" / "disk-b.raw").read_bytes() == B


def test_a_salvage_of_a_sound_archive_is_a_restore(path: Path, tmp_path: Path) -> None:
    store(path, RAW, manifest(RAW))
    good("restore", "--salvage", path, tmp_path / "out")
    assert contents(tmp_path / "out") == {"disk-a.raw": A, "disk-b.raw": B, **CONFIGS}


def test_what_is_missing_reads_as_zero_in_existing_targets_too(
    path: Path, tmp_path: Path, need: Need
) -> None:
    store(path, flipped(RAW, IN_A.offset + 60))
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * len(A))
    bad("restore", "--salvage", "--quiet", path, tmp_path / "o", "--device", f"a={target}", code=4)
    lost = slice(4 * CLUSTER_BYTES, 6 * CLUSTER_BYTES)
    assert target.read_bytes()[lost] == bytes(2 * CLUSTER_BYTES)
    assert target.read_bytes()[: lost.start] == A[: lost.start]
    (qemu_img, _) = need("qemu-img", "qemu-storage-daemon")
    image = f"{tmp_path / 'a.qcow2'},format=qcow2"
    bad("restore", "--salvage", "--quiet", path, tmp_path / "p", "--device", f"a={image}", code=4)
    raw = tmp_path / "a.raw"
    subprocess.run([qemu_img, "convert", "-O", "raw", tmp_path / "a.qcow2", raw], check=True)
    assert raw.read_bytes() == target.read_bytes()


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize("where", ["magic", "middle", "all of it"])
@pytest.mark.parametrize("compressed", [False, True])
def test_without_the_header_disks_have_numbers(
    path: Path, tmp_path: Path, has_manifest: bool, where: str, compressed: bool
) -> None:
    raw = flipped(RAW, 0 if where == "magic" else 5000)
    if where == "all of it":
        raw = RAW[EXTENTS[0].offset - 100 :]
    if compressed:
        path = path.with_name("vm.vma.zst")
        raw = frames_with_table(raw)
    store(path, raw, manifest(RAW) if has_manifest else None)
    bad("restore", path, tmp_path / "no")
    done = run("restore", "--salvage", path, tmp_path / "out")
    assert done.returncode == 4, done.stderr.decode()
    told = done.stdout.decode()
    assert "the configs are, too, and the disks' names" in told
    files = contents(tmp_path / "out")
    assert set(files) == {"disk-1.raw", "disk-2.raw", JSON_NAME, TEXT_NAME}
    assert files["disk-1.raw"] == A
    assert files["disk-2.raw"][: len(B)] == B
    if has_manifest:
        assert len(files["disk-2.raw"]) == len(B)
        assert f"disk 2 was 'b', {len(B)} bytes" in told
        assert salvage_map(tmp_path / "out")["2"]["state"] == "sound"
    else:
        assert len(files["disk-2.raw"]) == 9 * CLUSTER_BYTES
        assert "up to 65535 bytes at its end are not its own" in told
        assert salvage_map(tmp_path / "out")["2"]["state"] == "unchecked"
    assert (
        "store it in a file"
        in bad("restore", "--salvage", f"exec:cat {path}", tmp_path / "piped", code=1)
        or where == "magic"
    )


def test_what_is_no_archive_is_not_salvaged(path: Path, tmp_path: Path) -> None:
    path.write_bytes(CHANCE.randbytes(300_000))
    assert "not a vma file" in bad("restore", "--salvage", path, tmp_path / "out")
    path.write_bytes(b"")
    assert "is empty" in bad("restore", "--salvage", path, tmp_path / "out")
    path.write_bytes(b"VMA")
    text = bad("restore", "--salvage", path, tmp_path / "out")
    assert "ends inside its header" in text
    assert "--salvage" not in text  # it is what was tried
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_table", [False, True])
def test_a_damaged_zstd_frame_costs_what_it_holds(
    path: Path, tmp_path: Path, with_table: bool
) -> None:
    bounds = [0, *(extent.offset for extent in EXTENTS), len(RAW)]
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    frames = [pack(RAW[start:end]) for start, end in itertools.pairwise(bounds)]
    data = b"".join([*frames[:4], flipped(frames[4], 900), *frames[5:]])
    if with_table:
        from tests.archives import encode_seek_table
        from vmapipe.vma.seektable import Frame

        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        data += encode_seek_table(
            [Frame(len(frame), size) for frame, size in zip(frames, sizes, strict=True)]
        )
    path = path.with_name("vm.vma.zst")
    store(path, data)
    assert states(path)["b"] == ("sound", "zstd")
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out", code=4)
    found = salvage_map(tmp_path / "out")
    # The frame is that of the fourth extent.
    assert ranges(found["a"]) == [(6 * CLUSTER_BYTES, 2 * CLUSTER_BYTES, "missing")]
    assert (tmp_path / "out" / "disk-b.raw").read_bytes() == B


def test_what_the_checksum_of_one_great_frame_does_not_vouch_for_is_damaged(path: Path) -> None:
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    data = pack(RAW)
    store(path, flipped(data, len(data) - 2))
    assert {state for state, _ in states(path).values()} <= {"damaged", "incomplete"}
    # Cut off, it says nothing against what came before.
    store(path, data[: len(data) * 3 // 4])
    assert states(path)["a"] == ("unchecked", None)
    assert states(path)["b"][0] == "incomplete"


def test_verify_says_what_the_compression_has_proved(path: Path, need: Need) -> None:
    import gzip

    for data, words, by in (
        (frames_with_table(RAW), "the zstd checksum of all", "zstd"),
        (gzip.compress(RAW, 1), "the gzip CRC of the member", "gzip"),
        (lzop(need("lzop")[0], RAW), "the lzo checksums of all blocks are right", "lzo"),
        (zstandard.compress(RAW), "0 of 1 zstd frames have a checksum", None),
    ):
        store(path, data)
        told = good("verify", path).decode()
        assert words in told
        assert states(path)["a"] == ("sound" if by else "unchecked", by)
        event = json.loads(good("verify", "--json", path).splitlines()[-1])
        assert words in event["proved"]
        assert event["devices"][0]["checked_by"] == by
    store(path, RAW)
    assert "complete and unchecked" in good("verify", path).decode()
    store(path, RAW, manifest(RAW))
    assert "complete and sound (every byte compared" in good("verify", path).decode()


def test_of_clusters_that_come_twice_the_first_one_counts(path: Path, tmp_path: Path) -> None:
    other = archive({"a": CHANCE.randbytes(len(A)), "b": B}, CONFIGS, slots=2)
    twice = extents_of(other)[2]
    again = other[twice.offset : twice.offset + twice.total_bytes]
    store(path, RAW + again)
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out", code=4)
    assert (tmp_path / "out" / "disk-a.raw").read_bytes() == A
    found = salvage_map(tmp_path / "out")
    assert ranges(found["a"]) == [(4 * CLUSTER_BYTES, 2 * CLUSTER_BYTES, "damaged")]
    # A manifest knows which of them was stored.
    store(path, RAW + again, manifest(RAW))
    assert states(path) == {"a": ("sound", "manifest"), "b": ("sound", "manifest")}
    same = RAW[twice.offset : twice.offset + twice.total_bytes]
    store(path, RAW + same, manifest(RAW))
    assert states(path) == {"a": ("sound", "manifest"), "b": ("sound", "manifest")}
    good("restore", path, tmp_path / "out2", "--device", "a")
    assert (tmp_path / "out2" / "disk-a.raw").read_bytes() == A
    # Also where it stands in front, in the place of another: then those are in doubt that were
    # taken for others before it was noticed, and none behind them.
    at = EXTENTS[0].offset
    store(path, RAW[:at] + again + RAW[at:], manifest(RAW))
    assert states(path)["b"] == ("sound", "manifest")
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out3", code=4)
    doubted = ranges(salvage_map(tmp_path / "out3")["a"])
    assert doubted[0] == (0, 6 * CLUSTER_BYTES, "damaged")
    assert max(offset + length for offset, length, _ in doubted) == 6 * CLUSTER_BYTES
    assert (tmp_path / "out3" / "disk-a.raw").read_bytes()[6 * CLUSTER_BYTES :] == A[
        6 * CLUSTER_BYTES :
    ]


def test_memory_that_may_have_lost_its_end_is_incomplete(path: Path, tmp_path: Path) -> None:
    disks = {"a": A, "vmstate": CHANCE.randbytes(4 * CLUSTER_BYTES)}
    raw = archive(disks, slots=2)
    extents = extents_of(raw)
    cut = raw[: extents[-1].offset]
    store(path, cut)
    # Nothing shows it: the length stands nowhere.
    assert states(path)["vmstate"][0] == "unchecked"
    store(path, cut + b"x")
    assert states(path)["vmstate"][0] == "incomplete"
    store(path, cut, manifest(raw))
    assert states(path)["vmstate"][0] == "incomplete"
    assert states(path)["a"] == ("sound", "manifest")
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out", code=4)
    state = (tmp_path / "out" / "vmstate.bin").read_bytes()
    assert state == disks["vmstate"][: 2 * CLUSTER_BYTES]
    # Lost in the middle, it is zero there.
    gone = flipped(raw, extents[-2].offset + 100)
    store(path, gone, manifest(raw))
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out2", code=4)
    state = (tmp_path / "out2" / "vmstate.bin").read_bytes()
    assert state == bytes(2 * CLUSTER_BYTES) + disks["vmstate"][2 * CLUSTER_BYTES :]


def test_a_disk_that_claims_256_tib_costs_no_memory(path: Path, tmp_path: Path) -> None:
    """Its clusters that are missing are one range, and those that are there a few entries."""
    device = Device(1, "huge", 1 << 48)
    header = encode_header(Header(bytes(range(16)), 0, (device,), ()))
    small = archive({"huge": A}, slots=1, order=in_order({"huge": A})[3:5])
    store(path, header + small[extents_of(small)[0].offset :])
    report = report_of(path)
    assert [one[:3] for one in report.disks[0].ranges] == [
        (0, 3 * CLUSTER_BYTES, "missing"),
        (5 * CLUSTER_BYTES, (1 << 48) - 5 * CLUSTER_BYTES, "missing"),
    ]


def test_two_configs_of_one_name_are_both_restored(path: Path, tmp_path: Path) -> None:
    configs = (Config("qemu.conf", b"first"), Config("qemu.2onf", b"second"))
    raw = encode_header(Header(bytes(range(16)), 0, (Device(1, "a", len(A)),), configs))
    from tests.vma.archives import with_md5

    raw = with_md5(raw.replace(b"qemu.2onf", b"qemu.conf"), 32)
    small = archive({"a": A})
    store(path, raw + small[extents_of(small)[0].offset :])
    told = good("restore", path, tmp_path / "out").decode()
    assert "one of them is written as 'qemu.conf.2'" in told
    assert contents(tmp_path / "out") == {
        "disk-a.raw": A,
        "qemu.conf": b"first",
        "qemu.conf.2": b"second",
    }


def test_the_salvages_own_files_overwrite_nothing(path: Path, tmp_path: Path) -> None:
    store(path, RAW[: IN_B.offset])
    out = tmp_path / "out"
    out.mkdir()
    (out / JSON_NAME).write_bytes(b"mine")
    assert "exists already" in bad("restore", "--salvage", path, out)
    assert contents(out) == {JSON_NAME: b"mine"}


def test_a_manifest_of_another_archive_does_not_stop_a_salvage(path: Path, tmp_path: Path) -> None:
    other = archive(DISKS, uuid=b"another archive!")
    store(path, RAW, manifest(other))
    assert "belongs to another archive" in bad("restore", path, tmp_path / "no")
    bad("restore", "--salvage", "--quiet", path, tmp_path / "out", code=4)
    assert salvage_map(tmp_path / "out")["a"]["state"] == "unchecked"
    assert (tmp_path / "out" / "disk-a.raw").read_bytes() == A


def test_a_target_that_reads_as_zero_already_is_left_alone(path: Path, tmp_path: Path) -> None:
    """In process: a map's `0:` says so."""
    store(path, flipped(RAW, IN_A.offset + 60))
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * len(A))
    spec = TargetSpec(str(target), Kind.EXISTING, write_zeroes=False)
    with a_cancel() as cancel, open_damaged(str(path), cancel, ReadOptions()) as opened:
        restore(
            opened,
            Plan({1: spec}),
            lambda event: None,
            cancel,
            Options(salvage_folder=str(tmp_path)),
        )
    assert target.read_bytes()[4 * CLUSTER_BYTES : 6 * CLUSTER_BYTES] == b"\xaa" * 2 * CLUSTER_BYTES


def with_lost_sectors(path: Path, *places: int) -> tuple[str, ...]:
    """What runs `vmapipe` where these 4096 bytes of the archive's disk cannot be read."""
    sectors = ",".join(map(str, places))
    return (sys.executable, "-m", "tests.restore.lost_sectors", str(path), sectors)


@pytest.mark.parametrize("has_manifest", [False, True])
def test_what_the_archives_own_disk_cannot_read_is_missing_and_ends_no_salvage(
    path: Path, tmp_path: Path, has_manifest: bool
) -> None:
    """One sector of data in the third extent, and the header of the eighth, which is b's third."""
    store(path, RAW, manifest(RAW) if has_manifest else None)
    sector = (IN_A.offset + 512 + CLUSTER_BYTES + 8192) // 4096 * 4096
    tool = with_lost_sectors(path, sector, IN_B.offset // 4096 * 4096)
    out = tmp_path / "out"
    bad("restore", "--salvage", "--quiet", path, out, code=4, tool=tool, cwd=ROOT)
    found = salvage_map(out)
    assert ranges(found["a"]) == [(5 * CLUSTER_BYTES, CLUSTER_BYTES, "missing")]
    assert found["a"]["state"] == found["b"]["state"] == "incomplete"
    lost = sector - IN_A.offset - 512 + 4 * CLUSTER_BYTES
    a = (out / "disk-a.raw").read_bytes()
    assert a == A[:lost] + bytes(4096) + A[lost + 4096 :]
    b = bytearray((out / "disk-b.raw").read_bytes())
    for offset, length, state in ranges(found["b"]):
        assert state == "missing"
        b[offset : offset + length] = B[offset : offset + length]
    assert b == B
    assert (
        f"the archive is on cannot read it: 4096 bytes (archive offset {sector})"
        in (out / TEXT_NAME).read_text()
    )
    if has_manifest:
        done = run("verify", "--json", path, tool=tool, cwd=ROOT)
        assert done.returncode == 4
        (disks,) = [
            event["devices"]
            for event in map(json.loads, done.stdout.splitlines())
            if isinstance(event.get("devices"), list)
        ]
        assert {disk["name"]: disk["state"] for disk in disks} == {
            "a": "incomplete",
            "b": "incomplete",
        }


def test_without_salvage_such_a_disk_ends_the_restore_with_the_place(
    path: Path, tmp_path: Path
) -> None:
    store(path, RAW)
    sector = (IN_A.offset + 8192) // 4096 * 4096
    tool = with_lost_sectors(path, sector)
    text = bad("restore", path, tmp_path / "out", tool=tool, cwd=ROOT)
    assert f"at offset {sector}: Input/output error" in text
