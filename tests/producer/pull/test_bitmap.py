# SPDX-License-Identifier: Apache-2.0
"""Exports with a dirty bitmap, of QEMU's own servers: what is clean is neither read nor guessed."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.machine import Need
from tests.producer.pull.bitmaps import CLUSTER, DIRTY, SIZE, Image, by_access, by_qemu_nbd
from tests.producer.pull.reading import content, runs
from vmapipe.producer.pull.connections import Endpoint
from vmapipe.producer.pull.export import ExportError, open_export
from vmapipe.producer.pull.uri import NbdUri
from vmapipe.producer.pull_reader import PullReader
from vmapipe.runtime.cancel import Cancel


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Image:
    return Image(tmp_path_factory.mktemp("image"), need)


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


def test_a_server_that_comes_back_without_the_bitmap_is_another_disk(
    image: Image, short_folder: Path
) -> None:
    other = pytest.raises(
        ExportError, match="is another disk than before: its dirty bitmap was B and is not there"
    )
    with ExitStack() as stack:
        with by_qemu_nbd(image, short_folder) as sock:
            reader = stack.enter_context(reading(sock))
        sock.unlink(missing_ok=True)
        stack.enter_context(by_qemu_nbd(image, short_folder, "not offered"))
        with other:
            content(reader, image.base)
