# SPDX-License-Identifier: Apache-2.0
"""The real guest agent: a file system that is frozen for the instant, and thawed whatever happens."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.control.monitor.beside import beside
from tests.control.monitor.foreign import connected
from tests.control.qemu.agent import be_killed_while_frozen, find_agent, with_agent
from tests.control.qemu.running_guest import RunningGuest, make_images, running_guest
from tests.guest import Kernel
from tests.machine import LIMIT_S, Need, end_of, good, next_event, started
from vmapipe.control.qemu.guest_agent import GuestAgent, frozen
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import ignore


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agent") / "agent.sock"


@pytest.fixture(scope="module")
def guest(
    qemu: str, need: Need, kernel: Kernel, socket: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGuest]:
    program = find_agent()
    if program is None:
        absent("a guest agent; scripts/setup unpacks Debian's into .venv/guest-agent")
    folder = tmp_path_factory.mktemp("guest")
    disks = make_images(need, folder)
    extra = with_agent(program, socket)
    with running_guest(need, kernel, folder, disks, extra=extra) as running:
        running.next_round()
        yield running


def is_frozen(socket: Path) -> bool:
    """As the agent sees it; wait for one that is being started."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            agent = GuestAgent(str(socket))
        except Failure:
            assert time.monotonic() < deadline
            continue
        try:
            return bool(agent.execute("guest-fsfreeze-status", LIMIT_S) == "frozen")
        finally:
            agent.close()


def needs_recovery(need: Need, archive: Path, folder: Path) -> bool:
    """Whether the archived file system was in use as far as its own superblock says."""
    (dumpe2fs,) = need("dumpe2fs")
    good("restore", archive, folder, "--device", "drive-virtio0")
    words = [dumpe2fs, "-h", str(folder / "disk-drive-virtio0.raw")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    (features,) = (line for line in said.splitlines() if line.startswith("Filesystem features:"))
    return "needs_recovery" in features.split()


def test_with_the_agent_the_archived_file_system_needs_no_recovery_and_without_it_does(
    need: Need, guest: RunningGuest, socket: Path, tmp_path: Path
) -> None:
    words = ("backup", "--json", "--qmp", guest.qmp)
    for name, agent in (("frozen", ("--freeze", "--agent", socket)), ("torn", ())):
        archive = tmp_path / f"{name}.vma"
        with started(*words, *agent, archive) as process:
            if agent:
                assert next_event(process, "thawed")["seconds"] < LIMIT_S
            next_event(process, "instant")
            guest.goes_on(2)
            assert end_of(process)[0] == 0
        assert needs_recovery(need, archive, tmp_path / name) is not bool(agent)
        guest.is_untouched()
    assert not is_frozen(socket)


def test_a_monitor_freezes_and_thaws_for_the_backups_that_it_is_told_to_make(
    need: Need, guest: RunningGuest, socket: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    with (
        beside(tmp_path, guest.qmp, f"--agent={socket}") as monitor,
        connected(monitor.socket) as qmp,
    ):
        qmp.cmd("backup", {"backup-file": str(archive), "devlist": "virtio0"})
        guest.goes_on(2)
        assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
    assert not needs_recovery(need, archive, tmp_path / "restored")
    assert not is_frozen(socket)
    guest.is_untouched()


def test_a_guest_that_is_paused_is_backed_up_without_its_agent(
    need: Need, guest: RunningGuest, socket: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    guest.ask("stop")
    said = good("backup", "--qmp", guest.qmp, "--agent", socket, archive).decode()
    assert guest.ask("query-status")["status"] == "paused"
    guest.ask("cont")
    assert "the guest is not running" in said
    guest.goes_on(2)


def test_a_backup_that_is_killed_while_the_guest_is_frozen_leaves_it_thawed(
    guest: RunningGuest, socket: Path
) -> None:
    be_killed_while_frozen(socket)
    guest.goes_on(2)
    assert not is_frozen(socket)


def test_an_agent_that_is_killed_while_the_guest_is_frozen_and_started_again_thaws_it(
    guest: RunningGuest, socket: Path, cancel: Cancel
) -> None:
    with frozen(str(socket), ignore, cancel):
        guest.does("kill -9 $(pidof qemu-ga)")
    guest.goes_on(2)
    assert not is_frozen(socket)


@pytest.mark.slow  # it waits as long as a guest may be frozen: 10 s
def test_a_guest_that_nobody_thaws_is_thawed_after_ten_seconds(
    guest: RunningGuest, socket: Path, cancel: Cancel
) -> None:
    with (
        pytest.raises(Failure, match="frozen for 10 s and the backup had not begun"),
        frozen(str(socket), ignore, cancel),
    ):
        guest.goes_on(2)
    assert not is_frozen(socket)


@pytest.mark.slow  # it is tried for 30 s
def test_an_agent_that_never_comes_back_is_cried_out_within_the_bound(
    guest: RunningGuest, socket: Path, cancel: Cancel
) -> None:
    """The last one here: the guest is thawed by an agent that is started by hand."""
    with (
        pytest.raises(Failure, match=r"THE GUEST MAY STILL BE FROZEN.*Thaw it by hand"),
        frozen(str(socket), ignore, cancel),
    ):
        guest.does("touch /tmp/no-agent; kill -9 $(pidof qemu-ga)")
    guest.does("qemu-ga -d -m virtio-serial -p /dev/vport?p1 -t /tmp -f /tmp/ga.pid")
    agent = GuestAgent(str(socket))
    assert agent.execute("guest-fsfreeze-thaw", LIMIT_S) == 1
    agent.close()
    guest.goes_on(2)
