# SPDX-License-Identifier: Apache-2.0
"""A QEMU that we start ourselves: it answers, says why it cannot, and never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.machine import LIMIT_S, Need
from vmapipe.access.machine import accelerator
from vmapipe.access.machine.process import MachineEnded, OwnQemu, find_qemu, quoted
from vmapipe.control.qmp.connection import Command
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.syscalls import readable

STILL = ("-machine", "none", "-S")


@pytest.fixture(autouse=True)
def _qemu(need: Need, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-system-x86_64", "setpriv")
    monkeypatch.setenv("TMPDIR", str(short_folder))


@pytest.fixture
def folder() -> Iterator[OwnFolder]:
    with OwnFolder("machine") as made:
        yield made


@pytest.fixture
def cancel() -> Iterator[Cancel]:
    made = Cancel()
    yield made
    made.close()


def test_it_answers_on_qmp_and_is_gone_after_its_block(folder: OwnFolder, cancel: Cancel) -> None:
    with OwnQemu("the guest", folder, STILL, cancel) as machine:
        assert machine.qmp.execute(Command("query-status", {}))["status"] == "prelaunch"
        pid = machine.pid
        assert os.getsid(pid) == pid, "a Ctrl-C at our terminal would reach it"
        assert not machine.wait(0)
    assert not psutil.pid_exists(pid)
    with pytest.raises(MachineEnded, match="has been ended"):
        _ = machine.qmp


def test_its_folder_may_have_any_name_and_go_before_it(short_folder: Path, cancel: Cancel) -> None:
    (short_folder / "a,b=c").mkdir()
    with OwnFolder("machine", str(short_folder / "a,b=c")) as folder:
        log = quoted(f"{folder.path}/log")
        words = (*STILL, "-chardev", f"file,id=log,path={log}")
        with OwnQemu("the guest", folder, words, cancel) as machine:
            assert os.path.exists(f"{folder.path}/log")
            folder.clear()
            assert not os.path.exists(folder.path)
            assert machine.qmp.execute(Command("query-status", {}))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-machine", "teapot"), "unsupported machine type"),
        (("-no-such-thing",), "invalid option"),
        (("-blockdev", "driver=file,node-name=a,filename=/nowhere"), "No such file or directory"),
    ],
)
def test_a_qemu_that_cannot_start_says_why_in_one_line(
    words: tuple[str, ...], reason: str, folder: OwnFolder, cancel: Cancel
) -> None:
    with pytest.raises(MachineEnded, match=f"^the guest: QEMU has ended: .*{reason}") as caught:
        OwnQemu("the guest", folder, words, cancel)
    assert "\n" not in str(caught.value)


def test_a_killed_qemu_is_named_with_its_signal(folder: OwnFolder, cancel: Cancel) -> None:
    with OwnQemu("the guest", folder, STILL, cancel) as machine:
        os.kill(machine.pid, signal.SIGKILL)
        assert readable([machine.fd], LIMIT_S)
        assert machine.wait(LIMIT_S)
        assert str(machine.ended()) == "the guest: QEMU was killed by SIGKILL"


def test_a_stop_ends_the_wait_for_it(folder: OwnFolder, cancel: Cancel) -> None:
    with OwnQemu("the guest", folder, STILL, cancel) as machine:
        timer = threading.Timer(0.1, cancel.ask, ["enough"])
        timer.start()
        with pytest.raises(Cancelled, match="enough"):
            machine.wait(LIMIT_S)
        timer.join()


def test_it_ends_with_us_even_when_we_are_killed(short_folder: Path) -> None:
    text = (
        "import sys, time\n"
        "from vmapipe.access.machine.process import OwnQemu\n"
        "from vmapipe.runtime.cancel import Cancel\n"
        "from vmapipe.runtime.folders import OwnFolder\n"
        "with OwnFolder('machine') as folder:\n"
        f"    machine = OwnQemu('the guest', folder, {STILL!r}, Cancel())\n"
        "    folder.clear()\n"
        "    print(machine.pid, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        pid = int(ours.stdout.readline())
        fd = os.pidfd_open(pid)
        try:
            ours.kill()
            assert readable([fd], LIMIT_S), "QEMU has outlived its parent"
        finally:
            os.close(fd)
    assert not list(short_folder.iterdir())


def test_a_missing_qemu_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Failure, match="Debian: qemu-system-x86"):
        find_qemu()


def test_the_probe_boots_a_guest_to_its_end(cancel: Cancel) -> None:
    assert accelerator.boots("tcg", cancel)
    assert not accelerator.boots("no-such-accelerator", cancel)


def test_a_wish_takes_the_place_of_the_probe(
    cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(accelerator.VARIABLE, "tcg")
    assert accelerator.accelerator(cancel) == "tcg"
    monkeypatch.setenv(accelerator.VARIABLE, "xen")
    with pytest.raises(UsageError, match="kvm or tcg"):
        accelerator.accelerator(cancel)
