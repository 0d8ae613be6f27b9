# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup --guest-latency` of a running QEMU: what its devices feel decides how fast it reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.control.qemu.daemon_backup import BOTH, wait_for_end
from tests.control.qemu.paused_machine import PausedMachine, faulty_machine
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.machine import Need, end_of, good, next_event, started
from vmapipe.control.qemu.guest_latency import GuestLatency
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, Qmp
from vmapipe.runtime.latency import NOTHING_FELT, bounds_ns

MIB = 1 << 20
CLUSTER = 65536
SIZE = 24 * MIB
DEVICE = "/machine/peripheral/virtio0/virtio-backend"
FLOOR = 2 * MIB
#: No request is answered within this: the backup is at its floor as long as the guest works.
NEVER = ("--guest-latency", "100us", "--latency-floor", "2M")


@pytest.fixture
def machine(qemu: str, need: Need, tmp_path: Path) -> Iterator[PausedMachine]:
    (program,) = need("qemu-system-x86_64")
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(range(1, 256)) * (SIZE // 255) + bytes(SIZE % 255))
    third = ("-qmp", f"unix:{tmp_path}/work.sock,server=on,wait=off")
    with faulty_machine(tmp_path, program, [image], {}, *third) as machine:
        yield machine


class Work:
    """A guest that writes all the time, in place of the paused one, until the block ends."""

    def __init__(self, folder: Path) -> None:
        self._monitor = QmpClient(str(folder / "work.sock"))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Work:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._monitor.close()

    def _run(self) -> None:
        number = 0
        while not self._over.wait(0.005):
            number = (number + 7) % (SIZE // CLUSTER)
            line = f'qemu-io -d {DEVICE} "aio_write -q {number * CLUSTER} 4096"'
            self._monitor.execute(Command("human-monitor-command", {"command-line": line}))


def histograms(machine: PausedMachine) -> list[dict[str, Any]]:
    (stats,) = [block["stats"] for block in machine.ask("query-blockstats") if block.get("qdev")]
    return [value for name, value in stats.items() if name.endswith("_latency_histogram")]


@pytest.mark.every_qemu
def test_a_guest_that_waits_too_long_is_given_way_to_and_the_rest_is_quick(
    machine: PausedMachine, tmp_path: Path, out: Path
) -> None:
    words = ("backup", "--json", "--qmp", machine.qmp, *NEVER, out / "vm.vma")
    with Work(tmp_path) as guest, started(*words) as process:
        next_event(process, "instant")
        while (told := next_event(process, "guest-latency"))["limit_bytes_s"] != FLOOR:
            assert told["limit_bytes_s"] > FLOOR
        assert told["requests"]
        assert told["p99_s"] > told["bound_s"] == 0.0001
        assert len(histograms(machine)) == 2
        (shown,) = [
            json.loads(line)["guest_latency"]
            for line in good("status", "--json", out / "vm.vma").splitlines()
        ]
        assert shown["limit_bytes_s"] == FLOOR
        assert len(shown["last_p99_s"]) == len(shown["last_read_bytes_s"]) >= 1
        guest.stop()
        # Nobody waits any more.
        while next_event(process, "guest-latency")["limit_bytes_s"] == FLOOR:
            pass
        done = next_event(process, "done")
        assert end_of(process)[0] == 0
    assert done["guest_latency"]["seconds_above"] >= 1
    assert done["guest_latency"]["worst_s"] > 0.0001
    assert done["speed_bytes_s"] == 0
    assert histograms(machine) == []
    assert machine.is_untouched()
    good("verify", out / "vm.vma")


def test_a_histogram_of_somebody_elses_stays_and_the_mean_is_used(
    machine: PausedMachine, tmp_path: Path, out: Path
) -> None:
    machine.ask("block-latency-histogram-set", id=DEVICE, **{"boundaries-write": [1000, 1000000]})
    words = ("backup", "--json", "--qmp", machine.qmp, *NEVER, "--speed", "8M", out / "vm.vma")
    with Work(tmp_path) as guest, started(*words) as process:
        notice = next_event(process, "notice")["text"]
        assert "latency histogram of somebody else's" in notice
        assert "for the mean" in notice
        while (told := next_event(process, "guest-latency"))["limit_bytes_s"] != FLOOR:
            # The user's own limit is kept all the time.
            assert FLOOR < told["limit_bytes_s"] <= 8 * MIB
        # However it ends.
        process.terminate()
        guest.stop()
        end_of(process)
    (theirs,) = histograms(machine)
    assert theirs["boundaries"] == [1000, 1000000]


def test_no_histogram_is_set_where_another_thread_of_qemus_may_count_in_it(
    machine: PausedMachine, tmp_path: Path, out: Path
) -> None:
    """It is freed without a lock there."""
    machine.ask("object-add", **{"qom-type": "iothread", "id": "io0"})
    words = ("backup", "--json", "--qmp", machine.qmp, *NEVER, "--speed", "8M", out / "vm.vma")
    with Work(tmp_path), started(*words) as process:
        assert "this QEMU has I/O threads: " in next_event(process, "notice")["text"]
        while next_event(process, "guest-latency")["limit_bytes_s"] != FLOOR:
            assert histograms(machine) == []
        process.terminate()
        end_of(process)


def test_the_histogram_of_a_backup_that_was_killed_with_its_guardian_is_removed_by_cleanup(
    machine: PausedMachine, tmp_path: Path, out: Path, temporary: Path
) -> None:
    words = ("backup", "--json", "--qmp", machine.qmp, *NEVER, "--speed", "1M", out / "vm.vma")
    with started(*words) as process:
        next_event(process, "instant")
        everybody = psutil.Process(process.pid).children(recursive=True)
        members = [psutil.Process(process.pid), *everybody]
        for member in members:
            member.suspend()
        for member in members:
            member.kill()
        end_of(process)
        wait_for_end(everybody)
        assert len(histograms(machine)) == 2
        removed = good("cleanup", "--qmp", machine.qmp).decode()
    assert removed.startswith("removed vmapipe-")
    assert histograms(machine) == []
    # One that is left alone, with nothing else, is found as well.
    mark = {"boundaries-read": [1009, 2003, 5000], "boundaries-write": [1009, 2003, 5000]}
    machine.ask("block-latency-histogram-set", id=DEVICE, **mark)
    removed = good("cleanup", "--qmp", machine.qmp).decode()
    assert removed == f"removed the latency histogram of {DEVICE}\n"
    assert histograms(machine) == []


def test_a_qemu_that_counts_no_requests_is_backed_up_and_that_is_said(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    said = good("backup", "--qmp", daemon.qmp, *BOTH, "--guest-latency", "20ms", out / "vm.vma")
    assert b"--guest-latency has no effect" in said


class Liar(Qmp):
    """A QEMU that answers one question with what it is told to, and has nothing to say to others."""

    def __init__(self, stats: Any) -> None:
        self.stats = stats

    def execute(self, command: Command) -> Any:
        if command.name == "query-blockstats":
            return [] if self.stats is None else [{"qdev": "disk0", "stats": self.stats}]
        return [] if command.name == "query-iothreads" else {}


BINS = len(bounds_ns(0.02)) + 1


def histogram(bins: Any, boundaries: Any = None) -> dict[str, Any]:
    ours = bounds_ns(0.02)
    found = {"boundaries": boundaries or ours, "bins": bins}
    return {"rd_latency_histogram": found, "wr_latency_histogram": found}


@pytest.mark.parametrize(
    "stats",
    [
        histogram(["many"] * BINS),
        histogram([None] * BINS),
        histogram([10**400] * BINS),
        histogram(7),
        histogram([1] * BINS, boundaries=7),
        {"rd_latency_histogram": [1, 2], "wr_latency_histogram": {}},
        {"rd_latency_histogram": {}},
        {"idle_time_ns": "long"},
    ],
)
@pytest.mark.parametrize("is_later", [True, False])
def test_numbers_that_cannot_be_are_said_once_and_cost_no_backup(
    stats: dict[str, Any], *, is_later: bool
) -> None:
    notices: list[str] = []
    liar = Liar({} if is_later else stats)
    latency = GuestLatency(liar, 0.02, 0.25, notices)
    assert latency.begin()
    liar.stats = stats
    felt = [latency.take() for _ in range(3)]
    assert not any(each.is_broken for each in felt)
    assert len(notices) <= 1
    for text in notices:
        assert "--guest-latency" in text


def test_numbers_that_go_back_and_a_device_that_is_another_one_are_no_slow_requests() -> None:
    notices: list[str] = []
    qemu = Liar({})
    latency = GuestLatency(qemu, 0.02, 0.25, notices)
    assert latency.begin()
    many, few = [0] * BINS, [0] * BINS
    many[-1], few[-1] = 2**64 - 1, 3
    for bins in (many, few, [-5] * BINS):
        qemu.stats = histogram(bins)
        assert latency.take().is_broken == (bins is many)
    qemu.stats = {}
    assert latency.take() == NOTHING_FELT
    assert notices == []


def test_a_device_that_is_unplugged_is_forgotten_and_one_in_its_place_is_measured() -> None:
    notices: list[str] = []
    qemu = Liar({})
    latency = GuestLatency(qemu, 0.02, 0.25, notices)
    assert latency.begin()
    slow = [0] * BINS
    slow[-1] = 5
    for stats, is_broken in (
        (histogram(slow), True),
        (None, False),  # unplugged
        (None, False),
        ({}, False),  # another one, of the same name: its histogram is set
        (histogram([0] * BINS), False),
        (histogram(slow), True),
    ):
        qemu.stats = stats
        assert latency.take().is_broken == is_broken
    assert notices == []
