# SPDX-License-Identifier: Apache-2.0
"""`vmapipe repack` and `vmapipe manifest`: any archive made anew, and read by others."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zstandard
from dissect.archive.vma import VMA

from tests.archives import ClusterAt, archive, extents_of, in_order, manifest
from tests.golden_archives import GoldenItem
from tests.machine import LIMIT_S, VMAPIPE, Need, bad, good
from vmapipe.archiver.job.writer import ArchiveWriter
from vmapipe.archiver.outputs.compress import Compression
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.manifests import Digests, ManifestFile
from vmapipe.places.reading import SoundArchive
from vmapipe.places.repack import Changes, Destination, Repacked, repack
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.vma.errors import ArchiveError

CONFIG = (
    b"scsi0: local:vm-1\n#qmdump#map:scsi0:a:local:raw:\n#qmdump#map:scsi1:b:local:raw:\nend: 1\n"
)


def _disks(clusters: int = 150) -> dict[str, bytes]:
    chance = random.Random(7)
    a = bytearray(chance.randbytes(clusters * 65536))
    a[5 * 65536 : 30 * 65536] = bytes(25 * 65536)
    a[40 * 65536 : 40 * 65536 + 4096] = bytes(4096)
    return {"a": bytes(a), "b": chance.randbytes(3 * 65536 + 1234)}


def _shuffled(disks: dict[str, bytes], seed: int = 1) -> list[ClusterAt]:
    order = in_order(disks)
    random.Random(seed).shuffle(order)
    return order


@pytest.fixture
def cancel() -> Iterator[Cancel]:
    with contextlib.closing(Cancel()) as one:
        yield one


def repacked(
    cancel: Cancel,
    source: str | Path,
    target: Path,
    changes: Changes | None = None,
    *,
    compress: bool = False,
    spool_bytes: int = 1 << 30,
) -> Repacked:
    """As the command does it, in this process."""

    def store(wake: object) -> ArchiveWriter[None]:
        output = FileOutput(str(target))
        digests = Digests(ManifestFile(f"{target}.manifest.json", replace=True))
        form = Compression(1, 1) if compress else None
        return ArchiveWriter(output, digests, lambda: None, form)

    destination = Destination(store, str(target.parent), spool_bytes)
    with SoundArchive(str(source), cancel) as sound:
        return repack(sound, changes or Changes(), destination, lambda at: None, cancel)


def _opened_by_dissect(path: Path) -> VMA:
    raw = path.read_bytes()
    if raw.startswith(b"\x28\xb5\x2f\xfd"):
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
            raw = stream.read()
    return VMA(io.BytesIO(raw))


def _digests_by_dissect(other: VMA) -> dict[str, str]:
    return {
        device.name: hashlib.sha256(other.device(device.id).open().read()).hexdigest()
        for device in other.devices()
        if device.name != "vmstate"
    }


def test_archives_of_the_reference_tool_are_repacked_and_another_reader_finds_the_same_disks(
    golden: Path, golden_digests: dict[str, list[GoldenItem]], out: Path, cancel: Cancel
) -> None:
    for name, items in golden_digests.items():
        target = out / f"{name}.zst"
        repacked(cancel, golden / name, target, compress=True)
        other = _opened_by_dissect(target)
        expected = {i.name: i.sha256 for i in items if i.kind == "device" and i.name != "vmstate"}
        assert _digests_by_dissect(other) == expected, name
        configs = {key: hashlib.sha256(data).hexdigest() for key, data in other.configs().items()}
        assert configs == {i.name: i.sha256 for i in items if i.kind == "config"}, name
    good("verify", "--require-manifest", "--quiet", *sorted(out.glob("*.zst")))


def test_lzo_of_the_reference_tool_is_repacked_too(
    golden: Path, golden_digests: dict[str, list[GoldenItem]], out: Path, cancel: Cancel, need: Need
) -> None:
    (lzop,) = need("lzop")
    name, items = next(iter(golden_digests.items()))
    source = out / f"{name}.lzo"
    subprocess.run([lzop, "-q", "-o", source, golden / name], check=True, timeout=LIMIT_S)
    repacked(cancel, source, out / "new.vma.zst", compress=True)
    expected = {i.name: i.sha256 for i in items if i.kind == "device" and i.name != "vmstate"}
    assert _digests_by_dissect(_opened_by_dissect(out / "new.vma.zst")) == expected


def test_out_of_order_from_anywhere_becomes_one_and_the_same_archive(
    tmp_path: Path, out: Path, cancel: Cancel
) -> None:
    disks = _disks()
    made = tmp_path / "ordered.vma"
    made.write_bytes(archive(disks, {"c": CONFIG}))
    repacked(cancel, made, out / "a.vma")
    expected = (out / "a.vma").read_bytes()
    raw = archive(disks, {"c": CONFIG}, order=_shuffled(disks), slots=11)
    (tmp_path / "plain.vma").write_bytes(raw)
    (tmp_path / "one.vma.gz").write_bytes(gzip.compress(raw, 1))
    (tmp_path / "one.vma.zst").write_bytes(zstandard.ZstdCompressor(level=1).compress(raw))
    (tmp_path / "mixed.vma").write_bytes(archive(disks, {"c": CONFIG}, order=_shuffled(disks, 2)))
    repacked(cancel, tmp_path / "mixed.vma", tmp_path / "b.vma")
    for name in ("plain.vma", "one.vma.gz", "one.vma.zst", "mixed.vma"):
        done = repacked(cancel, tmp_path / name, out / name)
        assert (out / name).read_bytes() == expected, name
        # A plain file is read where its data is; a stream's waits in a file.
        assert (done.kept_bytes > 0) == (".vma." in name)
        # The helper counts no zeroes, in the last line.
        made_lines = (out / f"{name}.manifest.json").read_bytes().splitlines()
        assert made_lines[:-1] == manifest(expected).splitlines()[:-1]
    sizes = [extent.total_bytes for extent in extents_of(expected)]
    assert sizes[1] > 58 * 65536  # one disk's, whole


def test_the_same_through_a_pipe_with_what_is_changed_on_the_way(tmp_path: Path, out: Path) -> None:
    disks = _disks(60)
    raw = archive(disks, {"c": CONFIG, "old": b"1"}, order=_shuffled(disks))
    (tmp_path / "new.conf").write_bytes(b"2")
    words: list[str | Path] = [
        "repack",
        "-",
        out / "vm.vma.zst",
        "--compress",
        "zstd:1",
        "--drop",
        "b",
    ]
    words += ["--rename", "a=z", "--config", f"old={tmp_path}/new.conf", "--quiet"]
    good(*words, "--config", f"{tmp_path}/new.conf", input=raw)
    good("verify", "--require-manifest", "--whole-file", "--quiet", out / "vm.vma.zst")
    found = _digests_by_dissect(_opened_by_dissect(out / "vm.vma.zst"))
    assert found == {"z": hashlib.sha256(disks["a"]).hexdigest()}
    configs = json.loads(good("config", "--json", out / "vm.vma.zst"))
    map_line = "#qmdump#map:scsi0:z:local:raw:\n"
    assert configs == {"c": f"scsi0: local:vm-1\n{map_line}end: 1\n", "old": "2", "new.conf": "2"}
    told = good("list", out / "vm.vma.zst").decode()
    assert "seekable    yes, zstd" in told


def test_the_same_contents_are_reproduced_byte_for_byte(tmp_path: Path, out: Path) -> None:
    """Whatever their uuid, their layout, and where they were compressed."""
    disks = _disks(60)
    whole = archive(disks, {"c": CONFIG})
    other = archive(disks, {"c": CONFIG}, order=_shuffled(disks), slots=7, uuid=bytes(16))
    for name, raw in (("one", whole), ("two", other)):
        (tmp_path / name).write_bytes(raw)
        good(
            "repack",
            "--reproducible",
            "--quiet",
            tmp_path / name,
            out / name,
            env={**os.environ, "SOURCE_DATE_EPOCH": "77"},
        )
    assert (out / "one").read_bytes() == (out / "two").read_bytes()
    assert json.loads(good("list", "--json", out / "one"))["ctime"] == 77
    good("repack", "--stable", "--quiet", tmp_path / "two", out / "three")
    good(
        "repack",
        "--stable",
        "--quiet",
        out / "one",
        out / "four",
        env={**os.environ, "SOURCE_DATE_EPOCH": "1"},
    )
    one, two = (
        json.loads(good("list", "--json", out / name))["uuid"] for name in ("three", "four")
    )
    assert one == two


@pytest.mark.parametrize("kind", ["flipped", "cut", "double", "missing", "trailing", "manifest"])
def test_a_damaged_archive_is_refused_and_nothing_is_left(
    kind: str, tmp_path: Path, out: Path, cancel: Cancel
) -> None:
    disks = _disks(60)
    order: Sequence[ClusterAt] = in_order(disks)
    if kind == "double":
        order = [*order, order[3]]
    if kind == "missing":
        order = order[1:]
    raw = bytearray(archive(disks, order=order))
    source = tmp_path / "vm.vma"
    if kind in ("flipped", "manifest"):
        (tmp_path / "vm.vma.manifest.json").write_bytes(manifest(bytes(raw)))
        raw[-5 if kind == "flipped" else 100] ^= 1
    if kind == "cut":
        raw = raw[:-1000]
    if kind == "trailing":
        raw += b"more"
    source.write_bytes(raw)
    with pytest.raises(ArchiveError):
        repacked(cancel, source, out / "new.vma")
    assert os.listdir(out) == []


def test_each_mistake_is_told_in_one_line(tmp_path: Path, out: Path) -> None:
    disks = _disks(60)
    raw = archive(disks, {"c": CONFIG}, order=_shuffled(disks))
    source = tmp_path / "vm.vma"
    source.write_bytes(raw)
    assert "has no device 'x'; it has 'a', 'b'" in bad(
        "repack", "--drop=x", source, out / "n", code=2
    )
    assert "use OLD=NEW" in bad("repack", "--rename=x", source, out / "n", code=2)
    assert "exists" in bad("repack", source, source)
    text = bad("repack", "--spool-size=1M", "-", out / "n", input=raw)
    assert "--spool-size" in text
    assert "archive offset" in bad("repack", "-", out / "n", input=raw[:-9], code=4)
    assert "no file can be made there" in bad(
        "repack", "--spool=/proc", "-", out / "n", input=raw, code=2
    )
    assert os.listdir(out) == []
    (out / "vm.vma.gz").write_bytes(gzip.compress(raw, 1))
    good("manifest", "--quiet", out / "vm.vma.gz")
    good("verify", "--require-manifest", "--whole-file", "--quiet", out / "vm.vma.gz")
    assert "exists" in bad("manifest", out / "vm.vma.gz", code=2)
    assert "only once" in bad("manifest", "-", code=2)
    (out / "cut.vma").write_bytes(raw[:-1])
    bad("manifest", out / "cut.vma", code=4)
    assert sorted(os.listdir(out)) == ["cut.vma", "vm.vma.gz", "vm.vma.gz.manifest.json"]


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, out: Path, cancel: Cancel
) -> None:
    source = tmp_path / "vm.vma"
    source.write_bytes(archive(_disks(60)))

    def store(wake: object) -> ArchiveWriter[None]:
        os.utime(source, ns=(1, 1))
        return ArchiveWriter(FileOutput(str(out / "n")), None, lambda: None)

    changed = pytest.raises(Failure, match="changed or replaced")
    with changed, SoundArchive(str(source), cancel) as sound:
        repack(sound, Changes(), Destination(store, str(out), 0), lambda at: None, cancel)
    assert os.listdir(out) == []


def test_a_repack_that_is_killed_leaves_no_archive(tmp_path: Path, out: Path) -> None:
    raw = archive(_disks(60))
    with subprocess.Popen(
        [*VMAPIPE, "repack", "-", str(out / "n")], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        process.stdin.write(raw[: len(raw) // 2])
        process.stdin.flush()
        process.kill()
    assert set(os.listdir(out)) <= {"n.partial", "n.manifest.json.partial"}
    good("repack", "--quiet", "-", out / "n", input=raw)
    assert sorted(os.listdir(out)) == ["n", "n.manifest.json"]


_LIMITED = """
import resource, sys
from vmapipe.control.main import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def _most_memory_kib(*words: str | Path) -> int:
    argv = [sys.executable, "-P", "-c", _LIMITED, *map(str, words)]
    done = subprocess.run(argv, capture_output=True, timeout=10 * LIMIT_S, check=True)
    return int(done.stderr)


def _repack_of_holes(folder: Path, size_bytes: int) -> int:
    disk, source, target = folder / "big.raw", folder / "big.vma", folder / "big.vma.zst"
    with disk.open("wb") as file:
        file.truncate(size_bytes)
        file.seek(size_bytes // 2)
        file.write(b"middle" * 40000)
    good("backup", "--quiet", "--disk", f"big={disk}", source)
    return _most_memory_kib("repack", "--compress", "zstd:1", "--quiet", source, target)


def test_a_disk_of_holes_takes_the_memory_of_a_small_one(tmp_path: Path) -> None:
    most_kib = []
    for name, size_bytes in (("small", 1 << 30), ("large", 1 << 34)):
        (tmp_path / name).mkdir()
        most_kib.append(_repack_of_holes(tmp_path / name, size_bytes))
    assert most_kib[1] < most_kib[0] + (16 << 10)


@pytest.mark.soak
def test_a_tebibyte_of_holes_takes_the_memory_of_a_small_disk(tmp_path: Path) -> None:
    assert _repack_of_holes(tmp_path, 1 << 40) < 200 << 10
