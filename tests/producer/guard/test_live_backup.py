# SPDX-License-Identifier: Apache-2.0
"""`vmapipe monitor` and `vmapipe backup --monitor`: real processes, while guests write."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import (
    LIMIT_S,
    bad,
    children,
    end_of,
    eventually,
    good,
    make_disk,
    next_event,
    sha256,
    started,
    without_limit,
)
from tests.producer.guard.serving import Served, serving
from tests.producer.guard.writers import Writers
from tests.protocol.nbd.client import Client
from vmapipe.protocol.nbd.constants import NBD_CMD_WRITE
from vmapipe.protocol.nbd.session import NbdRequest, encode_request

MIB = 1 << 20
CLUSTER = 65536
# The RFC's image: 6 MiB and a sector, every sector numbered, a part of it zero.
RFC_BYTES = 6 * MIB + 512
RFC_ZERO = range(2 * MIB, 3 * MIB)


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    path = tmp_path / "pattern.raw"
    sectors = b"".join(
        bytes(512) if sector * 512 in RFC_ZERO else struct.pack(">Q", sector + 1) * 64
        for sector in range(RFC_BYTES // 512)
    )
    path.write_bytes(sectors)
    return path


@contextmanager
def backing_up(served: Served, archive: Path | str, *options: str) -> Iterator[Any]:
    """A live backup that has reached its instant."""
    with started("backup", "--json", "--monitor", served.monitor, *options, archive) as process:
        next_event(process, "instant")
        yield process


def finish(process: Any) -> list[dict[str, Any]]:
    """Its remaining events; it must end well."""
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, stderr.decode()
    return [json.loads(line) for line in stdout.splitlines()]


def restored(archive: Path, folder: Path, name: str) -> Path:
    good("verify", archive)
    good("restore", "--no-configs", archive, folder)
    return folder / f"disk-{name}.raw"


# --- the RFC's regression test ---


@pytest.mark.parametrize("speed", ["0", "4M"])
def test_a_disk_nobody_writes_to_comes_back_as_it_was(
    tmp_path: Path, pattern: Path, speed: str
) -> None:
    with serving(tmp_path, d=pattern) as served:
        good("backup", "--monitor", served.monitor, "--speed", speed, tmp_path / "vm.vma")
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "d")) == sha256(pattern)


@pytest.mark.parametrize("speed", ["0", "4M"])
def test_random_reads_and_writes_after_the_start_are_not_in_the_backup(
    tmp_path: Path, pattern: Path, speed: str
) -> None:
    random_writes_after_the_start(tmp_path, pattern, speed, seed=1)


def random_writes_after_the_start(folder: Path, image: Path, speed: str, seed: int) -> int:
    before = sha256(image)
    archive = folder / f"vm-{seed}.vma"
    with (
        serving(folder, d=image) as served,
        backing_up(served, archive, "--speed", speed) as process,
        Writers(served, "d", seed=seed) as writers,
    ):
        finish(process)
    assert sha256(restored(archive, folder / f"out-{seed}", "d")) == before
    assert sha256(image) != before
    return writers.writes


@pytest.mark.soak
def test_the_random_test_over_and_over(tmp_path: Path, pattern: Path) -> None:
    for seed in range(100):
        random_writes_after_the_start(tmp_path, pattern, "0" if seed % 2 else "16M", seed)
        (tmp_path / f"vm-{seed}.vma").unlink()


# --- point in time ---


@pytest.mark.parametrize("seed", range(3))
def test_two_disks_show_the_same_instant(tmp_path: Path, seed: int) -> None:
    # A writer numbers its writes: first one disk, then, when that is
    # acknowledged, the other. At any instant they differ by one at most.
    disks = {name: make_disk(tmp_path / f"{name}.raw", "A" * 200) for name in "ab"}
    stop = threading.Event()
    faults: list[BaseException] = []
    numbers: list[int] = [0]
    place = random.Random(seed).randrange(200) * CLUSTER

    def count(served: Served) -> None:
        try:
            with Client(served.socket("a"), "a") as a, Client(served.socket("b"), "b") as b:
                while not stop.is_set():
                    stamp = struct.pack(">Q", numbers[0] + 1)
                    a.write(place, stamp)
                    b.write(place, stamp)
                    numbers[0] += 1
        except BaseException as error:  # noqa: BLE001  reported below
            faults.append(error)

    with serving(tmp_path, **disks) as served:
        thread = threading.Thread(target=count, args=(served,))
        for disk in disks.values():
            with disk.open("r+b") as raw:
                os.pwrite(raw.fileno(), bytes(8), place)
        thread.start()
        try:
            assert eventually(lambda: numbers[0] > 0 or bool(faults))
            good("backup", "--monitor", served.monitor, tmp_path / "vm.vma")
            # One may have been under way at the instant.
            more = numbers[0] + 2
            assert eventually(lambda: numbers[0] > more or bool(faults))
        finally:
            stop.set()
            thread.join(LIMIT_S)
    assert not faults
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    found = []
    for name in "ab":
        with (tmp_path / "out" / f"disk-{name}.raw").open("rb") as file:
            file.seek(place)
            found.append(struct.unpack(">Q", file.read(8))[0])
    assert found[0] - found[1] in (0, 1), found
    assert 0 < found[0] < numbers[0], "the instant was not among the writes"


# --- a slow archiver ---


def stop_archiver(process: Any) -> psutil.Process:
    archiver = children(process, "vmapipe.archiver.main")[0]
    archiver.suspend()
    return archiver


def test_a_spool_file_takes_what_memory_cannot_and_the_guest_does_not_wait(
    tmp_path: Path,
) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 800)
    before = sha256(image)
    options = ("--buffer", "8M", "--spool", str(tmp_path), "--spool-size", "64M")
    with serving(tmp_path, d=image) as served:
        with backing_up(served, tmp_path / "vm.vma", "--speed", "64K", *options) as process:
            archiver = stop_archiver(process)
            with Client(served.socket("d"), "d") as client:
                for cluster in range(0, 800, 2):  # 25 MiB: three times the memory
                    client.write(cluster * CLUSTER, b"new")
            told = next_event(process, "buffer")
            while told["spool_bytes"] == 0:
                told = next_event(process, "buffer")
            archiver.resume()
            # The rest in no time: nothing but the speed was holding it back.
            with Client(served.socket("d"), "d") as client:
                for cluster in range(1, 800, 2):
                    client.write(cluster * CLUSTER, b"new")
            finish(process)
        assert not list(tmp_path.glob("*spool*"))
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "d")) == before


def test_a_guest_that_waits_too_long_goes_on_and_the_backup_does_not(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 400)
    with serving(tmp_path, d=image) as served:
        # Long enough for a busy producer to tell of it: it looks four times a second.
        options = ("--buffer", "8M", "--guest-wait", "3", "--speed", "64K")
        with backing_up(served, tmp_path / "vm.vma", *options) as process:
            archiver = stop_archiver(process)
            with Client(served.socket("d"), "d") as client:
                for cluster in range(400):
                    client.write(cluster * CLUSTER, b"new")
                    assert client.read(cluster * CLUSTER, 3) == b"new"
            waiting = next_event(process, "buffer")
            while not waiting["waiting_writes"]:
                waiting = next_event(process, "buffer")
            archiver.resume()
            code, words = end_of(process)
        assert code == 1
        assert "a write of the guest has waited 3 s for room" in words, words
        assert "--guest-wait" in words
        assert not list(tmp_path.glob("vm.vma*"))
        good("backup", "--monitor", served.monitor, tmp_path / "again.vma")
    assert sha256(restored(tmp_path / "again.vma", tmp_path / "out", "d")) == sha256(image)


# --- what dies, and who goes on ---


@pytest.mark.parametrize("victim", ["archiver", "producer", "coordinator", "all"])
def test_whatever_dies_of_a_backup_the_guest_sees_no_error_and_the_next_one_works(
    tmp_path: Path, victim: str
) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 400)
    # Not so quick that they have everything saved, and the backup is over, before one is killed.
    with serving(tmp_path, d=image) as served, Writers(served, "d", pause_s=0.01) as writers:
        with backing_up(served, tmp_path / "vm.vma", "--speed", "64K") as process:
            family = psutil.Process(process.pid).children(recursive=True)
            chosen = {
                "archiver": children(process, "vmapipe.archiver.main"),
                "producer": children(process, "vmapipe.producer.main"),
                "coordinator": [psutil.Process(process.pid)],
                "all": [psutil.Process(process.pid), *family],
            }[victim]
            for one in chosen:
                one.kill()
            process.communicate(timeout=LIMIT_S)
            assert process.returncode not in (0, None)
            _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
            assert not alive
        before = writers.writes
        # To the same name: what nobody was left to remove is in nobody's way.
        good("backup", "--monitor", served.monitor, tmp_path / "vm.vma")
        good("verify", tmp_path / "vm.vma")
        assert writers.writes > before, "the guest did not go on"
        assert not list(tmp_path.glob("*.partial*"))


def test_the_processes_of_a_backup_stand_back_and_who_holds_writes_does_not(
    tmp_path: Path,
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with (
        serving(tmp_path, d=make_disk(tmp_path / "disk.raw", "A" * 64)) as served,
        backing_up(served, tmp_path / "vm.vma", "--speed", "1M") as process,
    ):
        for word in ("vmapipe.archiver.main", "vmapipe.producer.main"):
            (member,) = children(process, word)

            def low_threads(member: psutil.Process = member) -> int:
                threads = [os.getpriority(os.PRIO_PROCESS, t.id) for t in member.threads()]
                return threads.count(max(5, own))

            # Some begin only when there is something to do.
            assert eventually(lambda: low_threads() >= 3), word
            assert os.getpriority(os.PRIO_PROCESS, member.pid) == max(5, own)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == own
        (guard,) = children(served.process, "producer.guard.main")
        assert os.getpriority(os.PRIO_PROCESS, guard.pid) == own
        process.terminate()
        process.communicate(timeout=LIMIT_S)


def test_a_second_backup_at_the_same_time_is_refused_and_the_first_goes_on(
    tmp_path: Path,
) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 100)
    before = sha256(image)
    with (
        serving(tmp_path, d=image) as served,
        backing_up(served, tmp_path / "vm.vma", "--speed", "1K") as process,
    ):
        words = bad("backup", "--monitor", served.monitor, tmp_path / "second.vma")
        assert "disk 'd': a backup of it is running already" in words
        without_limit(process)
        finish(process)
    assert not (tmp_path / "second.vma").exists()
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "d")) == before


def test_a_cancelled_backup_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 200)
    with serving(tmp_path, d=image) as served:
        for _ in range(3):
            with (
                backing_up(served, tmp_path / "vm.vma", "--speed", "64K") as process,
                Writers(served, "d", pause_s=0.01),
            ):
                process.send_signal(signal.SIGINT)
                assert end_of(process)[0] == 130
            assert not list(tmp_path.glob("vm.vma*"))
        good("backup", "--monitor", served.monitor, tmp_path / "vm.vma")
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "d")) == sha256(image)


def test_guests_that_wait_too_long_are_given_way_to(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 384)
    before = sha256(image)
    # Now and then a write takes longer than this, since a cluster of old data is saved first.
    words = ("--guest-latency", "100us", "--latency-floor", "2M", "--speed", "4M")
    with (
        serving(tmp_path, d=image) as served,
        backing_up(served, tmp_path / "vm.vma", *words) as process,
    ):
        with Writers(served, "d", pause_s=0.02):
            while (told := next_event(process, "guest-latency"))["limit_bytes_s"] != 2 * MIB:
                assert 2 * MIB < told["limit_bytes_s"] <= 4 * MIB
            assert told["requests"] > 10
        without_limit(process)
        (done,) = [event for event in finish(process) if event["event"] == "done"]
    assert done["guest_latency"]["seconds_above"] >= 1
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "d")) == before


def test_a_guard_that_is_killed_is_started_again_and_serves(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 50)
    with serving(tmp_path, d=image) as served:
        with Client(served.socket("d"), "d") as client:
            client.write(70_000, b"survives")
        with backing_up(served, tmp_path / "vm.vma", "--speed", "64K") as process:
            children(served.process, "producer.guard.main")[0].kill()
            code, words = end_of(process)
        assert code == 1
        assert "its guard is gone" in words
        notice = next_event(served.process, "notice")
        while "started again" not in notice["text"]:
            notice = next_event(served.process, "notice")
        next_event(served.process, "serving")
        with Client(served.socket("d"), "d") as client:
            assert client.read(70_000, 8) == b"survives"
        good("backup", "--monitor", served.monitor, tmp_path / "vm.vma")


def test_a_disk_that_is_gone_for_a_while_harms_no_other_and_comes_back(tmp_path: Path) -> None:
    disks = {name: make_disk(tmp_path / f"{name}.raw", "A" * 5) for name in "ab"}
    with serving(tmp_path, **disks) as served, Client(served.socket("b"), "b") as other:
        disks["a"].rename(tmp_path / "elsewhere")
        guards = children(served.process, "producer.guard.main")
        next(guard for guard in guards if "--disk=a" in guard.cmdline()).kill()
        for when in ("at once", "in 1 s", "in 2 s"):
            notice = next_event(served.process, "notice")
            while "started again" not in notice["text"]:
                notice = next_event(served.process, "notice")
            assert notice["text"].endswith(when)
            other.write(0, b"goes on")
        (tmp_path / "elsewhere").rename(disks["a"])
        assert next_event(served.process, "serving")["disk"] == "a"
        with Client(served.socket("a"), "a") as client:
            client.write(0, b"back")


def test_a_client_that_dies_in_the_middle_of_a_write_harms_nobody(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 50)
    before = sha256(image)
    request = encode_request(NbdRequest(0, NBD_CMD_WRITE, 1, 100_000, 300_000)) + bytes(300_000)
    with (
        serving(tmp_path, d=image) as served,
        backing_up(served, tmp_path / "vm.vma", "--speed", "1M") as process,
    ):
        for cut in (10, 28, 1000, 200_000):
            with Client(served.socket("d"), "d") as client:
                client.send_raw(request[:cut])
                client.abandon()
        with Client(served.socket("d"), "d") as client:
            client.write(0, b"alive")
        without_limit(process)
        finish(process)
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "d")) == before


def test_a_disk_can_be_served_over_tcp_on_this_host_when_asked_for(
    tmp_path: Path, need: Any
) -> None:
    (qemu_img,) = need("qemu-img")
    image = make_disk(tmp_path / "d.raw", "A0h" * 5)
    with ExitStack() as stack:
        # It does not listen, and keeps the port from everybody but who listens there.
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        stack.enter_context(serving(tmp_path, "--export", f"d=tcp://127.0.0.1:{port}", d=image))
        done = subprocess.run(
            [qemu_img, "compare", "-f", "raw", "-F", "raw", image, f"nbd://127.0.0.1:{port}/d"],
            capture_output=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_log_says_when_a_slow_archiver_makes_the_guest_wait(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A" * 400)
    options = ("--buffer", "8M", "--speed", "64K")
    with (
        serving(tmp_path, d=image) as served,
        started("backup", "--monitor", served.monitor, *options, tmp_path / "vm.vma") as process,
    ):
        assert process.stdout is not None
        assert b"this is the instant" in process.stdout.readline()
        archiver = stop_archiver(process)
        with Client(served.socket("d"), "d") as client:
            writing = threading.Thread(
                target=lambda: [client.write(n * CLUSTER, b"x") for n in range(400)]  # type: ignore[func-returns-value]
            )
            writing.start()
            # There may be lines of progress, too.
            slow = b"d: the archiver is slow and the buffers are full"
            assert any(slow in line for line in process.stdout)
            archiver.resume()
            writing.join(LIMIT_S)
            assert not writing.is_alive()


def test_only_the_named_disks_are_backed_up(tmp_path: Path) -> None:
    disks = {
        name: make_disk(tmp_path / f"{name}.raw", "A" * 3, seed=n) for n, name in enumerate("abc")
    }
    with serving(tmp_path, **disks) as served:
        words = ("backup", "--monitor", served.monitor)
        good(*words, "--disk", "c", "--disk", "a", tmp_path / "vm.vma")
        said = bad(*words, "--disk", "x", tmp_path / "no.vma", code=2)
        assert "has no disk 'x', but a, b, c" in said
    listed = good("list", tmp_path / "vm.vma").decode()
    assert "c" in listed
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "a")) == sha256(disks["a"])
    assert not (tmp_path / "out" / "disk-b.raw").exists()
