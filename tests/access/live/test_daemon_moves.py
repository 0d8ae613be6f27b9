# SPDX-License-Identifier: Apache-2.0
"""A qemu-storage-daemon on an overlay moves to its target, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.access.live.machines import Daemon, live, processes, stop
from tests.access.serving import Served, serving
from tests.machine import Need, eventually, good, make_disk
from tests.protocol.nbd.client import Client

# 16 MiB: data, holes, zeroes, and a size that is not whole sectors.
PATTERN = "AAh0ApAA" * 32
TAIL_BYTES = 700
#: The disk takes some two seconds: there is time for a server to be killed.
SLOW = ("--speed", "4M")
#: It takes half a minute: the command is always killed sooner.
STILL = ("--speed", "256K")


@pytest.fixture(scope="module")
def stored(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk and its archive: copy what is to be changed."""
    need("qemu-storage-daemon", "qemu-img")
    folder = tmp_path_factory.mktemp("stored")
    disk = make_disk(folder / "a.raw", PATTERN, TAIL_BYTES)
    good("backup", "--quiet", "--disk", f"a={disk}", str(folder / "vm.vma"))
    return folder


@pytest.fixture
def disk(stored: Path) -> Path:
    return stored / "a.raw"


@pytest.fixture
def archive(tmp_path: Path, stored: Path) -> Path:
    for name in ("vm.vma", "vm.vma.manifest.json"):
        shutil.copy(stored / name, tmp_path / name)
    return tmp_path / "vm.vma"


@pytest.fixture
def served(tmp_path: Path, archive: Path) -> Iterator[Served]:
    with serving(tmp_path / "s", archive) as running:
        yield running


@pytest.fixture
def daemon(tmp_path: Path, served: Served) -> Iterator[Daemon]:
    machine = Daemon(tmp_path, served, "a")
    try:
        yield machine
    finally:
        machine.close()


def written(daemon: Daemon) -> dict[int, bytes]:
    """What its client writes: in data, in a hole, at the end."""
    found = {0: b"first" * 100, 150_000: b"hole" * 9000, 16 << 19: b"middle" * 1000}
    with Client(daemon.guest, "disk") as client:
        for offset, data in found.items():
            client.write(offset, data)
    return found


def expected(disk: Path, writes: dict[int, bytes]) -> bytes:
    content = bytearray(disk.read_bytes())
    for offset, data in writes.items():
        content[offset : offset + len(data)] = data
    return bytes(content)


def on_target(daemon: Daemon) -> bool:
    """Whether nothing of the archive, and no job, is left in it."""
    nodes = json.dumps(daemon.ask("query-named-block-nodes", flat=True))
    return "arch" not in nodes and daemon.ask("query-jobs") == []


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_the_export_goes_on_at_its_target_with_all_that_was_written(
    tmp_path: Path, out: Path, archive: Path, disk: Path, daemon: Daemon, image_format: str
) -> None:
    writes = written(daemon)
    words = (archive, out, "--qmp", daemon.qmp, "--format", image_format)
    with live(*words) as command:
        command.succeeds()
    assert command.moved == ["a"]
    assert on_target(daemon)
    with Client(daemon.guest, "disk") as client:
        client.write(4096, b"after")
        assert client.read_all(1 << 20)[: disk.stat().st_size] == expected(
            disk, writes | {4096: b"after"}
        )
    daemon.close()
    target = out / f"disk-a.{image_format}"
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", target, raw], check=True)
    assert raw.read_bytes()[: disk.stat().st_size] == expected(disk, writes | {4096: b"after"})
    assert sorted(os.listdir(out)) == [target.name]
    # Holes stay holes.
    assert target.stat().st_blocks * 512 < disk.stat().st_size * 0.8


@pytest.mark.parametrize(
    "moment",
    [
        "progress",
        pytest.param("restoring", marks=pytest.mark.soak),
        pytest.param("moved", marks=pytest.mark.soak),
    ],
)
def test_a_command_that_is_killed_is_said_again_and_goes_on(
    archive: Path, out: Path, disk: Path, daemon: Daemon, moment: str
) -> None:
    words = (archive, out, "--qmp", daemon.qmp)
    with live(*words, *(SLOW if moment == "moved" else STILL)) as command:
        command.hear(moment)
        if moment == "progress":
            command.hear(moment)  # the copy has begun
        command.kill()
    writes = written(daemon)
    with live(*words) as again:
        again.succeeds()
    assert on_target(daemon)
    daemon.close()
    target = (out / "disk-a.raw").read_bytes()
    assert target[: disk.stat().st_size] == expected(disk, writes)
    assert os.listdir(out) == ["disk-a.raw"]


def test_a_stopped_command_leaves_all_as_it_is_and_says_how_to_go_on(
    archive: Path, out: Path, disk: Path, daemon: Daemon
) -> None:
    words = (archive, out, "--qmp", daemon.qmp)
    with live(*words, *STILL) as command:
        command.hear("progress")
        command.hear("progress")
        command.process.send_signal(signal.SIGINT)
        code, said = command.end()
    assert (code, said) == (130, "vmapipe restore: cancelled by SIGINT")
    told = command.events[-2]["text"]
    assert f"to go on: vmapipe restore --live --json {archive} {out} --qmp {daemon.qmp}" in told
    with Client(daemon.guest, "disk") as client:
        assert client.read(0, 65536) == disk.read_bytes()[:65536]
    with live(archive, out) as again:  # the note knows the monitor
        again.succeeds()
    assert on_target(daemon)


def test_a_server_that_is_killed_is_started_again_and_nobody_gets_an_error(
    archive: Path, out: Path, disk: Path, tmp_path: Path
) -> None:
    served_by = serving(tmp_path / "s", archive)
    served = served_by.__enter__()
    daemon = Daemon(tmp_path, served, "a")
    try:
        with live(archive, out, "--qmp", daemon.qmp, *SLOW) as command:
            command.hear("progress")
            served.process.kill()
            served.process.communicate()
            command.hear("notice", "was started again")
            (ours,) = processes(f"--listen {tmp_path}/s")
            stop(ours)
            command.hear("notice", "was started again")
            with Client(daemon.guest, "disk") as client:
                size = disk.stat().st_size
                assert client.read_all(1 << 20)[:size] == disk.read_bytes()
            command.succeeds()
        assert on_target(daemon)
        assert not processes(f"--listen {tmp_path}/s")
    finally:
        daemon.close()
        with contextlib.suppress(AssertionError):
            served_by.__exit__(None, None, None)


def test_a_failed_request_is_made_again_when_the_archive_is_served_again(
    archive: Path, out: Path, disk: Path, tmp_path: Path
) -> None:
    served_by = serving(tmp_path / "s", archive)
    served = served_by.__enter__()
    daemon = Daemon(tmp_path, served, "a", reconnect_s=1)
    try:
        with live(archive, out, "--qmp", daemon.qmp, *STILL) as command:
            command.hear("progress")
            command.hear("progress")  # the copy has begun
            command.kill()
        served.process.kill()
        served.process.communicate()
        # Nobody serves it, for longer than QEMU waits: its job waits for us, or has ended.
        assert eventually(lambda: daemon.ask("query-jobs")[0]["status"] in ("paused", "concluded"))
        with live(archive, out) as again:
            again.succeeds()
        told = " ".join(str(event.get("text")) for event in again.events)
        assert "a request failed, and is made again" in told or "is begun again" in told
        daemon.close()
        assert (out / "disk-a.raw").read_bytes()[: disk.stat().st_size] == disk.read_bytes()
    finally:
        daemon.close()
        with contextlib.suppress(AssertionError):
            served_by.__exit__(None, None, None)


def test_damage_is_named_with_its_place_and_no_wrong_data_comes_to_the_target(
    archive: Path, out: Path, tmp_path: Path
) -> None:
    with archive.open("r+b") as file:
        file.seek(archive.stat().st_size // 2)
        file.write(b"damage")
    with serving(tmp_path / "s", archive) as served:
        daemon = Daemon(tmp_path, served, "a")
        try:
            # A server of ours says what is damaged; the user's says it to the user.
            served.process.kill()
            with live(archive, out, "--qmp", daemon.qmp) as command:
                code, said = command.end()
        finally:
            daemon.close()
            served.process.wait()
            served.process.returncode = 0
    assert code == 1
    assert "device 'a' cannot be copied" in said
    assert "is damaged (device 'a', byte " in said
    assert "to go on: vmapipe restore --live" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_target_is_told_and_goes_on_when_there_is_room(
    archive: Path, out: Path, disk: Path, daemon: Daemon
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", out], check=True)
    try:
        with live(archive, out, "--qmp", daemon.qmp) as command:
            told = command.hear("notice", "no space left")
            assert f"a: no space left for {out}/disk-a.raw" in told["text"]
            subprocess.run(["mount", "-o", "remount,size=40m", out], check=True)
            command.succeeds()
        assert on_target(daemon)
        daemon.close()
        assert (out / "disk-a.raw").read_bytes()[: disk.stat().st_size] == disk.read_bytes()
    finally:
        daemon.close()
        subprocess.run(["umount", out], check=True)


def test_an_existing_target_that_is_larger_is_used_as_far_as_the_disk_goes(
    archive: Path, out: Path, disk: Path, daemon: Daemon, tmp_path: Path
) -> None:
    target = tmp_path / "larger"
    target.write_bytes(b"\xaa" * (20 << 20))
    words = (archive, out, "--qmp", daemon.qmp, "--device", f"a={target}", "--allow-larger")
    with live(*words) as command:
        command.succeeds()
    daemon.close()
    found = target.read_bytes()
    assert found[: disk.stat().st_size] == disk.read_bytes()
    assert found[-(3 << 20) :] == b"\xaa" * (3 << 20)


def test_the_archives_name_may_go_while_its_server_lives(
    archive: Path, out: Path, disk: Path, daemon: Daemon
) -> None:
    with live(archive, out, "--qmp", daemon.qmp, *SLOW) as command:
        command.hear("progress")
        archive.unlink()
        command.succeeds()
    daemon.close()
    assert (out / "disk-a.raw").read_bytes()[: disk.stat().st_size] == disk.read_bytes()


def test_an_archive_that_cannot_be_served_again_is_named_with_the_way_on(
    archive: Path, out: Path, disk: Path, tmp_path: Path
) -> None:
    served_by = serving(tmp_path / "s", archive)
    served = served_by.__enter__()
    daemon = Daemon(tmp_path, served, "a")
    elsewhere = tmp_path / "elsewhere"
    try:
        with live(archive, out, "--qmp", daemon.qmp, *STILL) as command:
            command.hear("progress")
            shutil.move(archive, elsewhere)
            served.process.kill()
            code, said = command.end()
        assert code == 1
        assert f"cannot open the archive {archive}: No such file or directory" in said
        assert "nothing is lost" in said
        shutil.move(elsewhere, archive)
        with live(archive, out) as again:
            again.succeeds()
        daemon.close()
        assert (out / "disk-a.raw").read_bytes()[: disk.stat().st_size] == disk.read_bytes()
    finally:
        daemon.close()
        served.process.wait()
        with contextlib.suppress(AssertionError):
            served_by.__exit__(None, None, None)
