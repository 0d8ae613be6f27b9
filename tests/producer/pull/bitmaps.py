# SPDX-License-Identifier: Apache-2.0
"""An image with dirty bitmaps, and QEMU's servers that export it with one of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.machine import Need
from tests.producer.pull.servers import served

MIB = 1 << 20
CLUSTER = 1 << 16
SIZE = 64 * MIB + 512
# Written before the bitmap began, and afterwards; -z: zeroes over data.
BEFORE = ["write -P 1 0 4M", "write -P 2 20M 1M"]
AFTER = [
    "write -P 3 1M 128k",
    "write -z 2M 256k",
    "write -P 4 40M 4k",
    f"write -P 5 {64 * MIB} 512",
]
DIRTY = [(MIB, 2 * CLUSTER), (2 * MIB, 4 * CLUSTER), (40 * MIB, CLUSTER), (64 * MIB, 512)]


class Image:
    """A qcow2 image with a bitmap B that knows of all since `base`."""

    def __init__(self, folder: Path, need: Need) -> None:
        img, io, nbd, daemon = need("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
        self.nbd, self.daemon = nbd, daemon
        self.path = folder / "d.qcow2"

        def run(*words: str | Path) -> None:
            subprocess.run([str(word) for word in words], check=True, capture_output=True)

        def write(commands: list[str]) -> None:
            run(io, *(word for command in commands for word in ("-c", command)), self.path)

        def plain() -> bytes:
            run(img, "convert", "-f", "qcow2", "-O", "raw", self.path, folder / "raw")
            return (folder / "raw").read_bytes()

        run(img, "create", "-q", "-f", "qcow2", self.path, str(SIZE))
        write(BEFORE)
        self.base = plain()
        self.base_path = folder / "base.raw"
        self.base_path.write_bytes(self.base)
        run(img, "bitmap", "--add", "-g", str(CLUSTER), self.path, "B")
        write(AFTER)
        run(img, "bitmap", "--disable", self.path, "B")
        run(img, "bitmap", "--add", "-g", str(CLUSTER), "--disable", self.path, "none")
        self.content = plain()
        self.bitmaps = ("B", "none")


@contextmanager
def by_qemu_nbd(
    image: Image,
    folder: Path,
    bitmap: str = "B",
    *,
    writable: bool = False,
    path: Path | None = None,
) -> Iterator[Path]:
    sock = folder / "s"
    words: list[str | Path] = [image.nbd, *([] if writable else ["-r"]), "-t", "-e", "4"]
    if bitmap in image.bitmaps:
        words += ["-B", bitmap]
    with served(*words, "-f", "qcow2", "-k", sock, path or image.path, path=sock):
        yield sock


@contextmanager
def by_access(
    image: Image,
    folder: Path,
    bitmap: str = "B",
    *,
    is_breakable: bool = False,
    path: Path | None = None,
) -> Iterator[Path]:
    """QEMU's image fleecing with a bitmap, as Proxmox VE has it: nothing else can be asked for.

    `is_breakable`: the export `guest` takes writes, and the first one breaks the snapshot.
    """
    sock, scratch = folder / "s", folder / "scratch"
    with scratch.open("wb") as file:
        file.truncate(SIZE)
    what = {"node": "disk", "name": bitmap}
    nodes: list[dict[str, object]] = [
        {"driver": "file", "node-name": "f", "filename": str(path or image.path)},
        {"driver": "qcow2", "node-name": "disk", "file": "f"},
        {"driver": "file", "node-name": "scratch-file", "filename": str(scratch)},
        {"driver": "blkdebug", "node-name": "scratch", "image": "scratch-file"}
        | ({"inject-error": [{"event": "none", "iotype": "write"}]} if is_breakable else {}),
        {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "scratch"}
        | {"bitmap": what, "on-cbw-error": "break-snapshot"},
        {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"},
    ]
    export = {"type": "nbd", "id": "e", "node-name": "snap", "name": "", "bitmaps": [what]}
    words = [image.daemon]
    for node in nodes:
        words += ["--blockdev", json.dumps(node)]
    words += ["--nbd-server", f"addr.type=unix,addr.path={sock}", "--export", json.dumps(export)]
    if is_breakable:
        guest = {"type": "nbd", "id": "g", "node-name": "cbw", "name": "guest", "writable": True}
        words += ["--export", json.dumps(guest)]
    with served(*words, path=sock):
        yield sock
