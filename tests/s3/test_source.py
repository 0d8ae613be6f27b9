# SPDX-License-Identifier: Apache-2.0
"""An archive in a store is read by ranges: the same bytes, no more requests than needed."""

from __future__ import annotations

import functools
import random
import re
import threading

import pytest

from tests.archiver.outputs.targets import LIMIT_S, in_thread
from tests.machine import Need
from tests.restore.archive.stored import RAW, STORED
from tests.restore.support import DISKS, a_cancel, frames_with_table, lzop
from tests.s3.proxy import FaultyProxy
from tests.s3.server import BUCKET, S3Server
from vmapipe.restore.archive import input as input_module
from vmapipe.restore.archive import object as object_module
from vmapipe.restore.archive.errors import InputError
from vmapipe.restore.archive.reader import open_archive
from vmapipe.restore.archive.source import PlainFile, open_source
from vmapipe.runtime import objectstore
from vmapipe.runtime.errors import Cancelled
from vmapipe.vma.errors import ArchiveError

NAME = f"s3://{BUCKET}/a/vm.vma"
KEY = "a/vm.vma"


@functools.cache
def long_data() -> bytes:
    # Several ranges of 8 MiB.
    return random.Random(6).randbytes((20 << 20) + 77)


KINDS = ("none", "zstd, one frame", "zstd, seek table", "gzip")


def bytes_of(name: str, piece_bytes: int = 50_001) -> bytes:
    with a_cancel() as cancel:
        opened = open_source(name, cancel)
        assert not isinstance(opened, PlainFile)
        pieces = []
        try:
            while piece := opened.read(piece_bytes):
                pieces.append(piece)
        finally:
            opened.close()
    return b"".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_recognised_by_its_content_and_gives_the_same_bytes(
    kind: str, s3: S3Server
) -> None:
    s3.put(KEY, STORED[kind])
    with a_cancel() as cancel:
        opened = open_source(NAME, cancel)
        assert opened.compression == kind.split(",")[0]
        opened.close()
    assert bytes_of(NAME) == RAW


def test_lzo_comes_through_lzop(s3: S3Server, need: Need) -> None:
    (program,) = need("lzop")
    s3.put(KEY, lzop(program, RAW))
    assert bytes_of(NAME) == RAW


def test_a_long_object_comes_in_order_whatever_the_pieces(s3: S3Server) -> None:
    s3.put(KEY, long_data())
    assert bytes_of(NAME, 3_000_001) == long_data()
    assert bytes_of(NAME, len(long_data()) + 5) == long_data()


def test_only_the_start_is_asked_for_when_the_header_is_all_that_is_wanted(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    for raw, most in (
        (RAW + long_data(), 100_000),
        (frames_with_table(RAW + long_data()), 8 << 20),
    ):
        proxy.requests.clear()
        proxy.body_bytes_out = 0
        s3.put(KEY, raw)
        with a_cancel() as cancel, open_archive(NAME, cancel) as opened:
            assert [device.name for device in opened.header.devices] == list(DISKS)
        assert proxy.body_bytes_out < most < len(raw)
        assert len(proxy.requests) <= 5


@pytest.mark.parametrize("kind", ["none", "zstd, seek table"])
@pytest.mark.parametrize("what", ["cut answer", "refused", "500", "503", "lost answer"])
def test_a_fault_that_passes_is_survived(
    s3: S3Server, proxy: FaultyProxy, kind: str, what: str
) -> None:
    s3.put(KEY, STORED[kind])
    proxy.plan("HEAD", what.replace("cut answer", "500"))
    proxy.plan("GET", what, times=2)
    assert bytes_of(NAME) == RAW


@pytest.mark.parametrize("what", ["cut answer", "503"])
def test_a_fault_that_stays_names_the_object_and_the_offset(
    s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(objectstore, "ATTEMPTS", 2)
    s3.put(KEY, long_data())
    # The second range begins where the first, of 64 KiB, has ended.
    proxy.plan("GET .*bytes=65536-", what, times=100)
    with pytest.raises(InputError, match=rf"cannot read {NAME} at offset 65536: .*, 2 times"):
        bytes_of(NAME)


def test_an_object_that_is_replaced_while_it_is_read_is_no_archive_of_two_halves(
    s3: S3Server,
) -> None:
    s3.put(KEY, long_data())
    with a_cancel() as cancel:
        opened = open_source(NAME, cancel)
        assert not isinstance(opened, PlainFile)
        assert opened.read(10) == long_data()[:10]
        s3.put(KEY, bytes(len(long_data())))
        with pytest.raises(InputError, match=f"{NAME} was replaced while it was read"):
            opened.read(len(long_data()))
        opened.close()


def test_what_is_not_there_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"cannot open {NAME}: there is no such object"):
        bytes_of(NAME)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=f"cannot look at {NAME}: 403: .*credentials"):
        bytes_of(NAME)


def test_an_empty_object_is_no_archive(s3: S3Server) -> None:
    s3.put(KEY, b"")
    with a_cancel() as cancel, pytest.raises(ArchiveError, match="the archive is empty"):
        open_archive(NAME, cancel)


@pytest.mark.parametrize("where", ["HEAD", "GET .*bytes=0-31", "GET .*bytes=65536-"])
def test_a_store_that_does_not_answer_does_not_keep_a_stop_waiting(
    s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(input_module, "_END_WAIT_S", 0.1)
    s3.put(KEY, long_data())
    stalled = proxy.plan(where, "stall")

    def work() -> None:
        opened = open_source(NAME, cancel)
        assert not isinstance(opened, PlainFile)
        try:
            while opened.read(1 << 20):
                pass
        finally:
            opened.close()

    with a_cancel() as cancel:
        with in_thread(work) as errors:
            assert stalled.fired.wait(LIMIT_S)
            cancel.ask("cancelled by a test")
        assert [type(error) for error in errors] == [Cancelled]


def test_memory_for_ranges_is_bounded_whatever_the_reader_does(
    s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_module, "_RANGE_BYTES", 100_000)
    s3.put(KEY, long_data())
    with a_cancel() as cancel:
        opened = open_source(NAME, cancel)
        assert not isinstance(opened, PlainFile)
        for at in range(10):
            assert opened.read(100_000) == long_data()[at * 100_000 : (at + 1) * 100_000]
            ends = [int(n) for n in re.findall(r"bytes=\d+-(\d+)", "\n".join(proxy.requests))]
            # What was taken, a buffer, and four ranges.
            assert max(ends) <= (at + 1) * 100_000 + (64 << 10) + 5 * 100_000
        opened.close()


def test_closing_in_the_middle_leaves_no_thread(s3: S3Server) -> None:
    s3.put(KEY, long_data())
    before = threading.active_count()
    with a_cancel() as cancel:
        opened = open_source(NAME, cancel)
        assert not isinstance(opened, PlainFile)
        opened.read(100_000)
        opened.close()
    assert threading.active_count() <= before
