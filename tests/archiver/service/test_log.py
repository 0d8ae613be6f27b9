# SPDX-License-Identifier: Apache-2.0
"""Whoever reads a service's log and stops reading holds nothing up, and hears what was left out."""

from __future__ import annotations

import os
from pathlib import Path

from tests.archiver.service.serving import serving
from tests.machine import good, make_disk
from vmapipe.archiver.service.main import LogStream


def test_a_log_that_nobody_reads_is_dropped_and_counted() -> None:
    read, write = os.pipe()
    try:
        log = LogStream(write, lambda count: f"{count} left out\n")
        for number in range(20_000):
            log.write(f"{number:060}\n")
        got = b""
        while b"left out" not in got:
            got += os.read(read, 1 << 20)
            log.flush()
        lines = got.decode().splitlines()
        whole = [int(line) for line in lines[:-1]]
        assert whole == list(range(len(whole)))
        assert lines[-1] == f"{20_000 - len(whole)} left out"
        log.write("and on\n")
        assert os.read(read, 100) == b"and on\n"
    finally:
        os.close(read)
        os.close(write)


def test_a_log_whose_reader_is_gone_costs_nothing() -> None:
    told: list[int] = []

    def drop(count: int) -> str:
        told.append(count)
        return ""

    read, write = os.pipe()
    os.close(read)
    try:
        log = LogStream(write, drop)
        # More than is held for a reader who is only late.
        for _ in range(1000):
            log.write("x" * 10_000)
        log.close(1.0)
        assert told == [], "nothing was held, so nothing was dropped"
    finally:
        os.close(write)


def test_a_service_whose_log_nobody_reads_takes_backups_and_ends(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", "A0")
    with serving(tmp_path / "store") as served:
        # The pipe is as good as full: a page is left of it.
        assert served.process.stdout is not None
        fd = os.open(f"/proc/{served.process.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
        try:
            while True:
                os.write(fd, b"x" * 4095 + b"\n")
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
        good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "vm.vma")
        served.process.terminate()
        assert served.process.wait(timeout=30) == 0
    assert "vm.vma" in served.stored()
