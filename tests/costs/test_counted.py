# SPDX-License-Identifier: Apache-2.0
"""What a backup and a restore cost, counted: the same on every machine and at any load, unlike its time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from tests.control.qemu.storage_daemon import storage_daemon, wait_for_socket
from tests.machine import VMAPIPE, make_disk
from tests.producer.memorydisk import cut
from vmapipe.clusters.sizes import (
    BLOCK_BYTES,
    CLUSTER_BYTES,
    EXTENT_CLUSTERS,
    EXTENT_HEADER_BYTES,
    FULL_MASK,
)
from vmapipe.producer.runs import piece_bytes
from vmapipe.producer.source import RawSource
from vmapipe.protocol import limits
from vmapipe.vma.extent import encode_extent_header, parse_extent_header, slot_word
from vmapipe.vma.packer import Packer

MIB = 1 << 20
SIZE_MIB = 64
#: As with one disk: half of the archiver's window.
FRAME_BYTES = 8 * MIB
EXTENT_BYTES = EXTENT_CLUSTERS * CLUSTER_BYTES
_COUNTED = "trace=read,pread64,preadv,preadv2,write,pwrite64,writev,pwritev,sendmsg,sendto,recvfrom,recvmsg,execve"
_MOVED = re.compile(r" (preadv2?|writev|pread64|pwrite64|pwritev)\(.* = (\d+)$")

_RECEIVED = re.compile(r"recv(?:from|msg)(?:\(| resumed>).* = (\d+)$", re.MULTILINE)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "dense.raw", "A" * (SIZE_MIB * 16))


def test_a_dense_disk_takes_a_frame_an_extent_and_its_data_is_stored_where_it_was_read(
    dense: Path,
) -> None:
    memory = memoryview(bytearray(piece_bytes(FRAME_BYTES)))
    source = RawSource("dense", str(dense))
    try:
        made = list(cut(source, memory, FRAME_BYTES))
    finally:
        source.close()
    assert len(made) == -(-SIZE_MIB * MIB // EXTENT_BYTES)
    assert all(run.position == 0 and run.length == EXTENT_BYTES for run in made[:-1])


def test_a_disk_that_is_a_quarter_full_takes_a_frame_for_several_extents(tmp_path: Path) -> None:
    # 1 MiB of data, 3 MiB of holes, and so on.
    image = make_disk(tmp_path / "quarter.raw", ("A" * 16 + "h" * 48) * 64)
    source = RawSource("quarter", str(image))
    memory = memoryview(bytearray(piece_bytes(FRAME_BYTES)))
    try:
        made = list(cut(source, memory, FRAME_BYTES))
    finally:
        source.close()
    assert sum(run.length for run in made) == 64 * MIB
    # One for each 3.6 MiB of data would be 18.
    assert len(made) <= 30


def test_a_tib_of_holes_takes_a_frame_for_each_64_gib(tmp_path: Path) -> None:
    image = tmp_path / "holes.raw"
    with image.open("wb") as file:
        file.truncate(1 << 40)
    source = RawSource("holes", str(image))
    try:
        made = list(cut(source, memoryview(b""), FRAME_BYTES))
    finally:
        source.close()
    assert len(made) <= 1024 // 64 + 1


def test_zeroes_are_packed_64_extents_at_a_time_and_hold_their_headers_only() -> None:
    packer: Packer[None] = Packer(bytes(16))
    clusters = (64 << 30) // CLUSTER_BYTES
    tracemalloc.start()
    try:
        made = packer.add(1, 0, clusters, b"", b"", None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    extents = sum(extent.extents for extent in made)
    assert extents == clusters // EXTENT_CLUSTERS
    assert len(made) <= extents / 64 + 2
    # The parts of 64 of them beside the headers that are handed on.
    assert peak_bytes < (extents + 8 * 64) * EXTENT_HEADER_BYTES


def test_an_extent_keeps_views_of_what_it_was_given_and_copies_nothing() -> None:
    packer: Packer[None] = Packer(bytes(16))
    payload = memoryview(bytearray(limits.MAX_PAYLOAD_BYTES))
    tracemalloc.start()
    try:
        for number in range(16):
            for _ in packer.add(1, 64 * number, 64, b"\xff" * 128, payload, None):
                pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 << 10


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_backup_reads_each_byte_once_and_writes_it_once_in_few_system_calls(
    dense: Path, tmp_path: Path
) -> None:
    words = ["backup", "--quiet", "--disk", f"a={dense}", str(tmp_path / "vm.vma")]
    read, written, calls = traced(tmp_path / "calls", words)
    assert read == SIZE_MIB * MIB
    assert SIZE_MIB * MIB < written < SIZE_MIB * MIB * 1.01
    # Two reads and one write for each extent, and a few of the import's.
    assert calls < 3 * (SIZE_MIB * MIB // EXTENT_BYTES + 1) + 45


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_many_disks_are_read_in_pieces_of_half_a_megabyte_and_more(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "one.raw", "A" * 16)
    disks = [word for number in range(32) for word in ("--disk", f"d{number}={disk}")]
    read, _, calls = traced(tmp_path / "calls", ["backup", "--quiet", *disks, "/dev/null"])
    assert read == 32 * MIB
    # A share of the archiver's window each, which is 8 clusters, made it 8 reads and frames a disk.
    # A look at the image's format is three reads more, and a process' name a write.
    assert calls < 32 * 6 + 45


def test_a_disk_in_use_by_qemu_is_received_once_and_stored_from_where_it_was_received(
    dense: Path, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    need("strace", "qemu-storage-daemon")
    with storage_daemon(tmp_path, d=dense) as daemon:
        words = ["backup", "--quiet", "--qmp", str(daemon.qmp), "--disk", "d", "/dev/null"]
        read, written, _ = traced(tmp_path / "calls", words)
    received = received_in(tmp_path / "calls")
    assert SIZE_MIB * MIB < sum(received) < SIZE_MIB * MIB * 1.02
    assert read < MIB
    assert SIZE_MIB * MIB < written < SIZE_MIB * MIB * 1.01
    # A Unix socket holds some 200 KiB; headers of requests and messages are small.
    large = [count for count in received if count >= BLOCK_BYTES]
    assert len(large) < 2 * SIZE_MIB * MIB // CLUSTER_BYTES


def test_an_empty_raw_disk_in_use_by_qemu_costs_a_few_messages_whatever_its_size(
    tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    """QEMU sends a hole as a request for each megabyte: here it would be 65,536 of them."""
    need("strace", "qemu-storage-daemon")
    image, log = tmp_path / "d.raw", tmp_path / "calls"
    with image.open("wb") as file:
        file.truncate(64 << 30)
    with storage_daemon(tmp_path, d=image) as daemon:
        words = ["backup", "--quiet", "--qmp", str(daemon.qmp), "--disk", "d", "/dev/null"]
        traced(log, words)
    received = received_in(log)
    # QEMU's answers to some sixty commands, and what the processes say to each other.
    assert len(received) < 400
    assert sum(received) < MIB


def test_an_export_that_is_pulled_is_received_once_in_large_pieces_and_stored_from_there(
    dense: Path, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    need("strace", "nbdkit")
    log, path = tmp_path / "calls", tmp_path / "export.sock"
    words = ["nbdkit", "-f", "-r", "-U", str(path), "file", str(dense)]
    with subprocess.Popen(words) as server:
        try:
            wait_for_socket(path, server)
            uri = f"nbd+unix:///?socket={path}"
            read, written, _ = traced(log, ["backup", "--quiet", "--nbd", f"a={uri}", "/dev/null"])
        finally:
            server.terminate()
    received = received_in(log)
    assert SIZE_MIB * MIB < sum(received) < SIZE_MIB * MIB * 1.02
    assert read < MIB
    assert SIZE_MIB * MIB < written < SIZE_MIB * MIB * 1.01
    # A request is a megabyte. What waits for its data takes it in one call, however it comes; else a
    # Unix socket gives some 200 KiB at a time.
    assert len([count for count in received if count >= BLOCK_BYTES]) < 2 * SIZE_MIB + 40


def test_a_qcow2_image_is_read_by_its_daemon_into_our_memory_and_comes_through_no_socket(
    dense: Path, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    need("strace", "qemu-img", "qemu-storage-daemon")
    log, image = tmp_path / "calls", tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-q", "-O", "qcow2", dense, image], check=True)
    words = ["backup", "--quiet", "--disk", f"a={image},format=qcow2", "/dev/null"]
    _, written, _ = traced(log, words)
    assert sum(received_in(log)) < MIB
    assert SIZE_MIB * MIB < written < SIZE_MIB * MIB * 1.01
    told = log.read_text(errors="replace")
    pieces = [int(count) for count in re.findall(r" pread64[( ].* = (\d+)$", told, re.MULTILINE)]
    assert SIZE_MIB * MIB <= sum(pieces) < SIZE_MIB * MIB * 1.05
    # Of the daemon's, one for an extent of ours; its own tables take some more.
    assert len(pieces) < 2 * (SIZE_MIB * MIB // EXTENT_BYTES + 1) + 40


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_restore_reads_each_byte_once_and_writes_it_once_in_few_system_calls(
    dense: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    subprocess.run([*VMAPIPE, "backup", "--quiet", "--disk", f"a={dense}", archive], check=True)
    target = tmp_path / "target.raw"
    target.write_bytes(bytes(SIZE_MIB * MIB))
    words = ["restore", "--quiet", str(archive), str(tmp_path), "--device", f"a={target}"]
    read, written, calls = traced(tmp_path / "calls", words)
    assert target.read_bytes() == dense.read_bytes()
    # With the extents' headers, which the archive's size has, too.
    assert SIZE_MIB * MIB < read < archive.stat().st_size
    assert SIZE_MIB * MIB <= written < SIZE_MIB * MIB + 4096
    # A read for an extent and one for its header, a write for 256 KiB; and a few of the import's.
    extents = SIZE_MIB * MIB // (EXTENT_CLUSTERS * CLUSTER_BYTES) + 1
    assert calls < 2 * extents + (SIZE_MIB * MIB >> 18) + extents + 40


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_restore_of_a_zst_reads_each_frame_once_in_few_system_calls_and_starts_copies_of_itself(
    dense: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma.zst"
    words = ["backup", "--quiet", "--compress", "zstd", "--disk", f"a={dense}", str(archive)]
    subprocess.run([*VMAPIPE, *words], check=True)
    target = tmp_path / "target.raw"
    target.write_bytes(bytes(SIZE_MIB * MIB))
    words = ["restore", "--quiet", str(archive), str(tmp_path), "--device", f"a={target}"]
    _, written, calls = traced(tmp_path / "calls", words)
    assert target.read_bytes() == dense.read_bytes()
    assert SIZE_MIB * MIB <= written < SIZE_MIB * MIB + 4096
    # A read for an extent, of all its frames, a write for 256 KiB; and a few of the import's.
    extents = SIZE_MIB * MIB // EXTENT_BYTES + 1
    assert calls < extents + (SIZE_MIB * MIB >> 18) + extents + 40
    # An interpreter of their own would cost each worker a tenth of a second of imports.
    assert (tmp_path / "calls").read_text(errors="replace").count("execve(") == 1


def traced(log: Path, words: list[str]) -> tuple[int, int, int]:
    """Runs vmapipe; the bytes read, in large reads, and written; and the calls for it."""
    subprocess.run(
        ["strace", "-f", "-qq", "-o", str(log), "-e", _COUNTED, *VMAPIPE, *words], check=True
    )
    read = written = calls = 0
    for line in log.read_text(errors="replace").splitlines():
        # A call that another thread interrupts is told on two lines; the second has its result.
        whole = re.sub(r"<\.\.\. (\w+) resumed>", r"\1(", line)
        if (moved := _MOVED.search(whole)) is None:
            continue
        call, count = moved[1], int(moved[2])
        calls += 1
        if call.startswith("preadv"):
            read += count
        elif call in ("writev", "pwritev") or (call == "pwrite64" and count >= CLUSTER_BYTES):
            written += count
    return read, written, calls


def received_in(log: Path) -> list[int]:
    """What came through sockets, in bytes, call by call."""
    return [int(count) for count in _RECEIVED.findall(log.read_text(errors="replace"))]


def test_a_dense_extents_header_is_read_in_few_steps() -> None:
    """Steps of Python: its 59 slots are looked at together, not one by one."""
    slots = [slot_word(FULL_MASK, 1, number) for number in range(EXTENT_CLUSTERS)]
    raw = encode_extent_header(bytes(16), slots, 16 * EXTENT_CLUSTERS)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        parse_extent_header(raw, bytes(16))
    finally:
        sys.setprofile(None)
    assert calls < 2 * EXTENT_CLUSTERS


#: Each costs a start some 3 to 14 ms, and comes along with others that are easily imported.
_COSTLY = (
    "logging concurrent.futures secrets hmac email importlib.metadata asyncio http urllib.request sqlite3 "
    "ctypes dataclasses inspect uuid vmapipe.runtime.event_types vmapipe.runtime.child_event_types"
)


@pytest.mark.parametrize(
    ("command", "most", "not_needed"),
    [
        (
            "vmapipe.control.cli.inspect",
            124,
            "zmq msgpack backports.zstd vmapipe.control.coordinator.job vmapipe.access "
            "vmapipe.places vmapipe.fleet vmapipe.crypt.age",
        ),
        (
            "vmapipe.control.cli.backup",
            105,
            "backports.zstd xxhash qemu vmapipe.restore vmapipe.protocol.service psutil subprocess "
            "vmapipe.runtime.event_types vmapipe.protocol.guard vmapipe.protocol.nbd.session "
            "vmapipe.control.qemu vmapipe.control.monitor vmapipe.control.qmp.client vmapipe.runtime.objectstore "
            "vmapipe.control.coordinator.proxmox vmapipe.archiver.outputs.compress vmapipe.access vmapipe.places vmapipe.fleet vmapipe.crypt",
        ),
        (
            "vmapipe.producer.main",
            116,
            "backports.zstd xxhash ssl vmapipe.vma vmapipe.producer.guard_feed "
            "vmapipe.producer.qemu_feed vmapipe.producer.vmstate_feed",
        ),
        (
            "vmapipe.archiver.main",
            141,
            "backports.zstd qemu vmapipe.restore vmapipe.access vmapipe.places vmapipe.fleet vmapipe.crypt "
            "vmapipe.archiver.base vmapipe.archiver.job.fill vmapipe.archiver.listener.tcp vmapipe.vma.groups "
            "vmapipe.archiver.outputs.object vmapipe.archiver.outputs.compress vmapipe.runtime.objectstore",
        ),
        (
            "vmapipe.control.cli.restore",
            189,
            "backports.zstd qemu lzallright psutil vmapipe.access vmapipe.places vmapipe.fleet "
            "vmapipe.crypt.age vmapipe.protocol.nbd vmapipe.runtime.event_types",
        ),
        (
            "vmapipe.restore.verify.verify",
            115,
            "backports.zstd qemu psutil vmapipe.runtime.event_types",
        ),
        (
            "vmapipe.restore.workers.worker",
            116,
            "backports.zstd qemu psutil vmapipe.protocol.nbd vmapipe.runtime.event_types",
        ),
    ],
)
def test_a_start_imports_only_what_it_needs(command: str, most: int, not_needed: str) -> None:
    """`most`: modules beyond those that an interpreter has before. Who needs more raises it, and says why."""
    code = (
        f"import sys; there = set(sys.modules); import {command}; print(*set(sys.modules) - there)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    modules = set(done.stdout.split())
    assert not modules & {*not_needed.split(), *_COSTLY.split()}
    assert len(modules) <= most


def test_listing_and_verifying_an_archive_load_nothing_of_what_it_does_not_have(
    tmp_path: Path,
) -> None:
    archive = tmp_path / "vm.vma"
    (tmp_path / "vm.raw").write_bytes(bytes(CLUSTER_BYTES))
    program = [sys.executable, "-m", "vmapipe.control.main"]
    disk = f"--disk=a={tmp_path / 'vm.raw'}"
    subprocess.run([*program, "backup", disk, archive], check=True, capture_output=True)
    code = (
        "import sys; from vmapipe.control.main import main; "
        f"main(['list', {str(archive)!r}]); main(['verify', {str(archive)!r}]); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = ("vmapipe.access", "vmapipe.places", "vmapipe.fleet", "vmapipe.crypt")
    loaded = {name for name in done.stdout.split() if name.startswith(rooms)}
    # How an encrypted archive begins: some bytes, and no library.
    assert loaded == {"vmapipe.crypt", "vmapipe.crypt.magic"}
