# SPDX-License-Identifier: Apache-2.0
"""Exports with a dirty bitmap, of QEMU's own servers: what is clean is neither read nor guessed."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.machine import Need
from tests.producer.pull.reading import content, runs
from tests.producer.pull.servers import served
from vmapipe.producer.pull.connections import Endpoint
from vmapipe.producer.pull.export import ExportError, open_export
from vmapipe.producer.pull.uri import NbdUri
from vmapipe.producer.pull_reader import PullReader
from vmapipe.runtime.cancel import Cancel

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
        run(img, "bitmap", "--add", "-g", str(CLUSTER), self.path, "B")
        write(AFTER)
        run(img, "bitmap", "--disable", self.path, "B")
        run(img, "bitmap", "--add", "-g", str(CLUSTER), "--disable", self.path, "none")
        self.content = plain()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Image:
    return Image(tmp_path_factory.mktemp("image"), need)


@contextmanager
def by_qemu_nbd(image: Image, folder: Path, bitmap: str = "B") -> Iterator[Path]:
    sock = folder / "s"
    words: list[str | Path] = [
        image.nbd,
        "-r",
        "-t",
        "-e",
        "4",
        "-f",
        "qcow2",
        "-B",
        bitmap,
        "-k",
        sock,
        image.path,
    ]
    with served(*words, path=sock):
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


@contextmanager
def reading(sock: Path, bitmap: str = "B") -> Iterator[PullReader]:
    uri = NbdUri("", socket=str(sock))
    endpoint = Endpoint("d", uri.shown, functools.partial(open_export, uri), bitmap)
    with ExitStack() as stack:
        cancel = stack.enter_context(closing(Cancel()))
        yield stack.enter_context(closing(PullReader(endpoint, cancel)))


@pytest.mark.parametrize("export", [by_qemu_nbd, by_access], ids=["all", "dirty only"])
def test_the_disk_is_what_the_bitmap_calls_dirty_above_the_base(
    image: Image, short_folder: Path, export: object
) -> None:
    serve = by_qemu_nbd if export is by_qemu_nbd else by_access
    with serve(image, short_folder) as sock, reading(sock) as reader:
        assert not reader.why_full
        assert content(reader, image.base) == image.content
        # Of what is dirty: base:allocation, where it is to be had, says that a part is zero.
        most = sum(length for _, length in DIRTY)
        assert reader.read_bytes == most - (4 * CLUSTER if serve is by_qemu_nbd else 0)


@pytest.mark.parametrize("export", [by_qemu_nbd, by_access], ids=["all", "dirty only"])
def test_of_a_disk_that_has_not_changed_nothing_is_read(
    image: Image, short_folder: Path, export: object
) -> None:
    serve = by_qemu_nbd if export is by_qemu_nbd else by_access
    with serve(image, short_folder, "none") as sock, reading(sock, "none") as reader:
        found = [pulled for pulled, _ in runs(reader, is_incremental=True)]
        assert all(pulled.is_unchanged for pulled in found)
        assert sum(pulled.run.clusters for pulled in found) == -(-SIZE // CLUSTER)
        assert not reader.read_bytes


def test_without_a_base_all_is_read(image: Image, short_folder: Path) -> None:
    with by_qemu_nbd(image, short_folder) as sock, reading(sock) as reader:
        assert content(reader) == image.content


def test_a_bitmap_that_is_not_offered_is_the_reason_for_a_full_backup(
    image: Image, short_folder: Path
) -> None:
    with by_qemu_nbd(image, short_folder) as sock, reading(sock, "other") as reader:
        assert "does not offer the bitmap 'other'" in reader.why_full
        assert content(reader) == image.content


def test_what_cannot_be_read_outside_of_the_dirty_parts_is_an_error_and_never_zeroes(
    image: Image, short_folder: Path
) -> None:
    refused = pytest.raises(ExportError, match=r"^disk 'd': cannot read near offset 0: Invalid")
    with by_access(image, short_folder) as sock, reading(sock) as reader, refused:
        content(reader)


def test_a_snapshot_that_breaks_after_all_was_read_fails_at_the_end(
    image: Image, short_folder: Path, tmp_path: Path, need: Need
) -> None:
    (io,) = need("qemu-io")
    copy = Path(shutil.copy(image.path, tmp_path / "copy.qcow2"))
    broken = pytest.raises(
        ExportError, match=r"^disk 'd': cannot read near offset \d+ at the end, "
    )
    with (
        by_access(image, short_folder, is_breakable=True, path=copy) as sock,
        reading(sock) as reader,
        broken,
    ):
        for pulled, _ in runs(reader, is_incremental=True):
            if reader.has_all:
                assert pulled.run.first_cluster + pulled.run.clusters == -(-SIZE // CLUSTER)
                guest = f"nbd+unix:///guest?socket={sock}"
                words = [io, "-f", "raw", "-c", "write -P 9 1M 64k", guest]
                subprocess.run(words, check=True, capture_output=True, timeout=60)
