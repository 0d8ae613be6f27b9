# SPDX-License-Identifier: Apache-2.0
"""Programs that we did not write, on the disks of a running monitor, while those are backed up.

Every backup here is slow and its archiver stands still for as long as the
program works: what the program writes meets clusters that nobody has saved yet,
and the backup cannot be over before the program is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.machine import LIMIT_S, Need, make_disk, sha256
from tests.producer.guard.serving import Served, serving
from tests.producer.guard.slow_backup import MIB, during_a_backup, restored, run

CLUSTER = 65536
# 16 MiB and a block, a mixture of all that a disk can be: 257 clusters, the last one short.
PATTERN = "AAh0pAAAAAhhhh0A" * 16 + "A"
TAIL_BYTES = 4096
SIZE = 256 * CLUSTER + TAIL_BYTES


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "d.raw", PATTERN, tail_bytes=TAIL_BYTES)


class Archived:
    """The archive of a disk, and what the disk was before."""

    def __init__(self, image: Path, archive: Path) -> None:
        self.archive = archive
        self.before = image.read_bytes()

    def check(self) -> None:
        assert restored(self.archive).read_bytes() == self.before


# --- QEMU's tools ---


def test_qemu_io_writes_in_every_way_while_a_backup_runs(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    (qemu_io,) = need("qemu-io")
    model = bytearray(disk.read_bytes())
    archived = Archived(disk, tmp_path / "vm.vma")
    commands = []

    def write(flags: str, pattern: int, offset: int, length: int) -> None:
        commands.append(f"write {flags} -P {pattern} {offset} {length}")
        model[offset : offset + length] = bytes([pattern]) * length

    def zero(flags: str, offset: int, length: int) -> None:
        commands.append(f"write -z {flags} {offset} {length}")
        model[offset : offset + length] = bytes(length)

    write("", 17, 0, 4096)
    write("-f", 18, 5 * CLUSTER + 512, 512)  # FUA
    write("", 19, 6 * CLUSTER - 1000, 2 * CLUSTER + 3000)  # unaligned, over four clusters
    write("", 20, 2 * CLUSTER + 100, 1)  # into a hole
    write("-f", 21, SIZE - 512, 512)  # the end
    zero("", 16 * CLUSTER, CLUSTER)
    zero("-f", 17 * CLUSTER + 512, 4096)
    zero("-u", 21 * CLUSTER, 3 * CLUSTER)  # may make a hole
    commands += ["flush", "aio_write -P 22 3145728 1048576", "aio_flush"]
    model[3 * MIB : 4 * MIB] = bytes([22]) * MIB
    for pattern, offset, length in (
        (17, 0, 4096),
        (18, 5 * CLUSTER + 512, 512),
        (19, 6 * CLUSTER - 1000, 2 * CLUSTER + 3000),
        (21, SIZE - 512, 512),
        (0, 17 * CLUSTER + 512, 4096),
        (0, 21 * CLUSTER, 3 * CLUSTER),
        (22, 3 * MIB, MIB),
    ):
        commands.append(f"read -P {pattern} {offset} {length}")
    discarded = slice(8 * MIB, 8 * MIB + 4 * CLUSTER)
    commands += [f"discard {discarded.start} {4 * CLUSTER}", "flush"]
    words = [word for command in commands for word in ("-c", command)]
    with serving(tmp_path, d=disk) as served:
        with during_a_backup(served, archived.archive):
            # Without a cache mode every write of qemu-io's is a FUA write.
            said = run(qemu_io, "-t", "writeback", "-f", "raw", *words, served.uri("d"))
        # What must fail does fail: the comparisons above are none by name only.
        wrong = ("-c", "read -P 99 0 4096")
        done = subprocess.run(
            [qemu_io, "-f", "raw", *wrong, served.uri("d")], capture_output=True, timeout=LIMIT_S
        )
        assert b"Pattern verification failed" in done.stdout
    assert "failed" not in said, said
    after = disk.read_bytes()
    assert after[discarded] in (bytes(4 * CLUSTER), bytes(model[discarded]))  # it is only a hint
    model[discarded] = after[discarded]
    assert after == model
    archived.check()


def test_qemu_img_converts_into_a_disk_while_a_backup_runs_and_compares_and_maps_it(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    (qemu_img,) = need("qemu-img")
    archived = Archived(disk, tmp_path / "vm.vma")
    source = make_disk(tmp_path / "new.raw", "0hAp" * 64 + "A", tail_bytes=TAIL_BYTES, seed=2)
    raw = ("-f", "raw", "-O", "raw")
    with serving(tmp_path, d=disk) as served:
        uri = served.uri("d")
        compared = (qemu_img, "compare", "-f", "raw", "-F", "raw", source, uri)
        differs = subprocess.run(
            list(map(str, compared)), capture_output=True, text=True, timeout=LIMIT_S
        )
        with during_a_backup(served, archived.archive):
            run(qemu_img, "convert", "-n", *raw, source, uri)
            assert "identical" in run(*compared)
            extents = json.loads(run(qemu_img, "map", "-f", "raw", "--output=json", uri))
            run(qemu_img, "convert", *raw, uri, tmp_path / "copy.raw")
    assert differs.returncode == 1
    assert "mismatch" in differs.stdout
    assert sha256(disk) == sha256(tmp_path / "copy.raw") == sha256(source)
    content = source.read_bytes()
    at = 0
    for extent in extents:
        assert extent["start"] == at
        at += extent["length"]
        assert not extent["zero"] or not any(content[extent["start"] : at])
    assert at == SIZE
    assert {extent["zero"] for extent in extents} == {True, False}
    archived.check()


def test_qemu_img_bench_writes_while_a_backup_runs(tmp_path: Path, disk: Path, need: Need) -> None:
    (qemu_img,) = need("qemu-img")
    archived = Archived(disk, tmp_path / "vm.vma")
    model = bytearray(archived.before)
    words = [qemu_img, "bench", "-f", "raw", "-w", "-d", "16", "-c", "2000", "-s", "4096"]
    words += ["-S", "7168", "-o", "1024", "--pattern", "170", "--flush-interval", "300"]
    for number in range(2000):
        offset = 1024 + 7168 * number
        model[offset : offset + 4096] = b"\xaa" * 4096
    with serving(tmp_path, d=disk) as served, during_a_backup(served, archived.archive):
        run(*words, served.uri("d"))
    assert disk.read_bytes() == model
    archived.check()


# --- who lists and describes ---


@contextmanager
def three_on_a_socket(folder: Path) -> Iterator[tuple[Served, Path, dict[str, Path]]]:
    """Three disks of different sizes which have one socket in common."""
    disks = {
        name: make_disk(folder / f"{name}.raw", "Ah" * 20, tail_bytes=512 * seed, seed=seed)
        for seed, name in enumerate(("a", "b", "with space"), 1)
    }
    common = folder / "common.sock"
    options = [word for name in disks for word in ("--export", f"{name}={common}")]
    with serving(folder, *options, **disks) as served:
        yield served, common, disks


def test_qemu_nbd_lists_all_exports_of_a_socket(tmp_path: Path, need: Need) -> None:
    (qemu_nbd,) = need("qemu-nbd")
    with (
        three_on_a_socket(tmp_path) as (served, common, disks),
        during_a_backup(served, tmp_path / "vm.vma"),
    ):
        said = run(qemu_nbd, "--list", "-k", common)
    assert f"exports available: {len(disks)}" in said
    for name, path in disks.items():
        part = said.partition(f"export: '{name}'")[2].partition("export: '")[0]
        assert f"size:  {path.stat().st_size}\n" in part
        assert "base:allocation" in part
        flags = part.partition("flags: ")[2].partition("\n")[0]
        assert {"flush", "fua", "trim", "zeroes", "multi", "fast-zero"} <= set(flags.split())
        assert "readonly" not in flags


def test_nbdinfo_describes_lists_and_maps_all_exports_of_a_socket(
    tmp_path: Path, need: Need
) -> None:
    (nbdinfo,) = need("nbdinfo")
    with (
        three_on_a_socket(tmp_path) as (served, common, disks),
        during_a_backup(served, tmp_path / "vm.vma"),
    ):
        listed = json.loads(run(nbdinfo, "--json", "--list", f"nbd+unix:///?socket={common}"))
        for name, path in disks.items():
            uri = f"nbd+unix:///{name.replace(' ', '%20')}?socket={common}"
            (export,) = json.loads(run(nbdinfo, "--json", uri))["exports"]
            assert export["export-name"] == name
            assert export["export-size"] == path.stat().st_size
            assert int(run(nbdinfo, "--size", uri)) == path.stat().st_size
            for able in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"):
                assert export[f"can_{able}"] is True, able
            assert export["is_read_only"] is False
            at = 0
            content = path.read_bytes()
            for extent in json.loads(run(nbdinfo, "--json", "--map", uri)):
                assert extent["offset"] == at
                at += extent["length"]
                is_data = any(content[extent["offset"] : at])
                assert extent["type"] == (0 if is_data else 3)
            assert at == len(content)
    sizes = {export["export-name"]: export["export-size"] for export in listed["exports"]}
    assert sizes == {name: path.stat().st_size for name, path in disks.items()}


# --- libnbd ---


def test_nbdcopy_copies_in_and_out_over_several_connections_while_a_backup_runs(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    (nbdcopy,) = need("nbdcopy")
    archived = Archived(disk, tmp_path / "vm.vma")
    source = make_disk(tmp_path / "new.raw", "A0hp" * 64 + "A", tail_bytes=TAIL_BYTES, seed=3)
    copies = [tmp_path / f"copy-{number}.raw" for number in range(2)]
    many = ("--connections=4", "--requests=16", "--flush")
    with serving(tmp_path, d=disk) as served, during_a_backup(served, archived.archive):
        run(nbdcopy, *many, served.uri("d"), copies[0])
        run(nbdcopy, *many, source, served.uri("d"))
        run(nbdcopy, *many, served.uri("d"), copies[1])
    assert copies[0].read_bytes() == archived.before
    assert sha256(copies[1]) == sha256(disk) == sha256(source)
    archived.check()


# Runs under the system's Python, where Debian's python3-libnbd is.
LIBNBD_SCRIPT = """
import random, sys, nbd

uri, path, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = bytearray(open(path, "rb").read())
handles = [nbd.NBD() for _ in range(3)]
for handle in handles:
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
first = handles[0]
assert first.get_size() == len(model)
assert first.can_multi_conn() and first.can_fua() and first.get_structured_replies_negotiated()

# Many at once, over all connections, in cells that no two share.
chance = random.Random(seed)
cells = chance.sample(range(len(model) // 8192), 900)
under_way = {handle: {} for handle in handles}
for cell in cells:
    handle = chance.choice(handles)
    offset = cell * 8192 + chance.choice((0, 512, 1000))
    length = chance.choice((1, 512, 4096, 7000))
    kind = chance.choice(("write", "write", "fua", "zero"))
    if kind == "zero":
        cookie = handle.aio_zero(length, offset, flags=chance.choice((0, nbd.CMD_FLAG_NO_HOLE)))
        model[offset : offset + length] = bytes(length)
        data = None
    else:
        data = nbd.Buffer.from_bytearray(bytearray(chance.randbytes(length)))
        flags = nbd.CMD_FLAG_FUA if kind == "fua" else 0
        cookie = handle.aio_pwrite(data, offset, flags=flags)
        model[offset : offset + length] = data.to_bytearray()
    under_way[handle][cookie] = data
    while len(under_way[handle]) >= 40:
        handle.poll(-1)
        done = [cookie for cookie in under_way[handle] if handle.aio_command_completed(cookie)]
        for cookie in done:
            del under_way[handle][cookie]
for handle in handles:
    while under_way[handle]:
        done = [cookie for cookie in under_way[handle] if handle.aio_command_completed(cookie)]
        for cookie in done:
            del under_way[handle][cookie]
        if not done:
            handle.poll(-1)
first.flush()
# What one connection has written every other one reads.
for number, handle in enumerate(handles):
    for offset in range(number * 4096, len(model), 1 << 20):
        length = min(1 << 20, len(model) - offset)
        assert handle.pread(length, offset) == model[offset : offset + length], offset
    chunks = bytearray()
    def chunk(data, offset, status, error):
        chunks.extend(data)
    handle.pread_structured(300_000, 12_345, chunk, flags=nbd.CMD_FLAG_DF)
    assert chunks == model[12_345 : 312_345]
extents = []
first.block_status(len(model), 0, lambda context, offset, entries, error: extents.extend(entries))
at = 0
for length, flags in zip(extents[::2], extents[1::2]):
    if flags & nbd.STATE_ZERO:
        assert not any(model[at : at + length]), at
    at += length
assert 0 < at <= len(model)
# Errors are told, and harm nothing.
first.set_strict_mode(0)
for wrong in (lambda: first.pread(512, len(model)), lambda: first.pwrite(b"x", len(model))):
    try:
        wrong()
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
    else:
        raise AssertionError("beyond the end")
first.trim(65536, 65536)
first.cache(65536, 0)
now = first.pread(65536, 65536)
assert now in (bytes(65536), model[65536:131072])
model[65536:131072] = now
for handle in handles:
    handle.shutdown()
open(path + ".model", "wb").write(model)
"""


@pytest.mark.parametrize("seed", range(2))
def test_libnbd_has_many_requests_under_way_while_a_backup_runs(
    tmp_path: Path, disk: Path, seed: int
) -> None:
    python = system_python_with("nbd")
    archived = Archived(disk, tmp_path / "vm.vma")
    twin = tmp_path / "twin.raw"
    shutil.copyfile(disk, twin)
    with serving(tmp_path, d=disk) as served, during_a_backup(served, archived.archive):
        run(python, "-c", LIBNBD_SCRIPT, served.uri("d"), twin, str(seed))
    assert disk.read_bytes() == (tmp_path / "twin.raw.model").read_bytes()
    assert disk.read_bytes() != archived.before
    archived.check()


def system_python_with(module: str) -> str:
    """Debian's own Python, where its packages put their modules."""
    python = "/usr/bin/python3"
    if (
        not Path(python).exists()
        or subprocess.run(
            [python, "-c", f"import {module}"], capture_output=True, timeout=LIMIT_S
        ).returncode
    ):
        absent(f"the module {module} of {python}")
    return python


# --- fio ---


@pytest.mark.parametrize("depth", [1, 16])
def test_fio_finds_all_that_it_wrote_at_random_while_a_backup_ran(
    tmp_path: Path, disk: Path, need: Need, depth: int
) -> None:
    (fio,) = need("fio")
    if "nbd" not in run(fio, "--enghelp").split():
        absent("fio's nbd engine")
    archived = Archived(disk, tmp_path / "vm.vma")
    # Every block is written once; what was written 200 blocks ago is read
    # between the writes, and everything once more at the end.
    job = ["--name=verify", "--ioengine=nbd", "--rw=randwrite", f"--size={SIZE}"]
    job += ["--bsrange=4k-64k", f"--iodepth={depth}", "--randseed=7"]
    job += ["--verify=crc32c", "--verify_fatal=1"]
    meanwhile = ["--verify_backlog=200", "--fsync=100", "--output-format=json"]
    again = [*job, "--verify_only"]
    with serving(tmp_path, d=disk) as served:
        uri = f"--uri={served.uri('d')}"
        with during_a_backup(served, archived.archive):
            # Its engine says "connected" on standard output.
            run(fio, "--output=fio.json", *job, *meanwhile, uri, cwd=tmp_path)
        (result,) = json.loads((tmp_path / "fio.json").read_text())["jobs"]
        assert result["error"] == 0
        assert result["write"]["io_bytes"] >= SIZE - CLUSTER
        assert result["read"]["io_bytes"] >= SIZE - CLUSTER  # it did look
        # fio does see damage: a byte that it did not write.
        run(fio, *again, uri, cwd=tmp_path)
        with disk.open("r+b") as raw:
            raw.seek(5 * MIB + 2000)
            byte = raw.read(1)[0]
            raw.seek(-1, os.SEEK_CUR)
            raw.write(bytes([byte ^ 0xFF]))
        done = subprocess.run(
            [fio, *again, uri], capture_output=True, timeout=LIMIT_S, cwd=tmp_path
        )
        assert done.returncode != 0
    archived.check()
