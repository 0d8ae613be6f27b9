# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder share: restores in this process, and ways to store an archive."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import zstandard

from tests.archives import encode_seek_table
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.reader import Archive, open_archive
from vmapipe.restore.job import Options, Result, restore
from vmapipe.restore.targets.plan import Plan, plan_folder
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Event
from vmapipe.vma.header import Header
from vmapipe.vma.seektable import Frame

MakePlan = Callable[[Header], Plan]

CHANCE = random.Random(4)
# One of each kind of cluster: full, zero, mixed; and an end that fits nothing.
DISK = (
    CHANCE.randbytes(3 * CLUSTER_BYTES)
    + bytes(2 * CLUSTER_BYTES)
    + (bytes(4096) + CHANCE.randbytes(4096)) * 8
    + CHANCE.randbytes(70_001)
)
STATE = CHANCE.randbytes(CLUSTER_BYTES) + bytes(CLUSTER_BYTES) + CHANCE.randbytes(CLUSTER_BYTES)
DISKS = {"drive-scsi0": DISK, "vmstate": STATE, "drive-ide0": CHANCE.randbytes(512)}
CONFIGS = {"qemu-server.conf": b"memory: 512\n", "empty.fw": b""}


@contextmanager
def a_cancel() -> Iterator[Cancel]:
    cancel = Cancel()
    try:
        yield cancel
    finally:
        cancel.close()


@contextmanager
def opened(name: str | Path, cancel: Cancel | None = None) -> Iterator[Archive]:
    with a_cancel() as own, open_archive(str(name), cancel or own) as archive:
        yield archive


def restored(
    name: str | Path,
    make_plan: MakePlan,
    *,
    hear: Callable[[Event], None] = lambda event: None,
    cancel: Cancel | None = None,
    options: Options | None = None,
) -> Result:
    """Restore in this process, with real workers."""
    with a_cancel() as own, open_archive(str(name), cancel or own) as archive:
        return restore(archive, make_plan(archive.header), hear, cancel or own, options)


def restored_to(name: str | Path, folder: Path, **more: Sequence[tuple[str, str | None]]) -> Result:
    """Restore to new files in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    return restored(name, lambda header: plan_folder(header, str(folder), **more))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected_files(disks: dict[str, bytes], configs: dict[str, bytes]) -> dict[str, bytes]:
    """What a folder holds after all of an archive was restored into it."""
    files = {
        f"disk-{name}.raw": data for name, data in disks.items() if name != "vmstate"
    } | configs
    if "vmstate" in disks:
        state = disks["vmstate"]
        files["vmstate.bin"] = state + bytes(-len(state) % CLUSTER_BYTES)
    return files


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_frame(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


def frames_with_table(raw: bytes, frame_bytes: int = 100_000) -> bytes:
    """As our archiver stores it: independent frames, and a seek table at the end."""
    parts = []
    frames = []
    for at in range(0, len(raw), frame_bytes):
        plain = raw[at : at + frame_bytes]
        parts.append(one_frame(plain))
        frames.append(Frame(len(parts[-1]), len(plain)))
    return b"".join(parts) + encode_seek_table(frames)


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def frames_and_notes(raw: bytes) -> bytes:
    """Many frames without a table, with notes between them."""
    half = len(raw) // 2
    parts = [skippable(b"first"), one_frame(raw[:half]), skippable(b""), one_frame(b"")]
    return b"".join([*parts, one_frame(raw[half:]), skippable(b"last")])


def members(raw: bytes) -> bytes:
    """gzip, two members."""
    half = len(raw) // 2
    return gzip.compress(raw[:half], 1) + gzip.compress(raw[half:], 1)


def lzop(program: str, raw: bytes) -> bytes:
    return subprocess.run([program, "-1c"], input=raw, capture_output=True, check=True).stdout


def is_root() -> bool:
    return os.geteuid() == 0


def flipped(raw: bytes, at: int) -> bytes:
    """One bit of a byte is another one."""
    return raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]
