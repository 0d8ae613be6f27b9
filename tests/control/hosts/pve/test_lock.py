# SPDX-License-Identifier: Apache-2.0
"""`lock: backup` in a configuration: ours, found again after any crash, and nobody else's."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.hosts.pve.simulated import SimulatedNode
from vmapipe.control.hosts.pve import lock as lock_module
from vmapipe.control.hosts.pve.lock import BackupLock, locked_text, unlocked_text
from vmapipe.control.hosts.pve.machine import MachineConfig
from vmapipe.control.hosts.pve.node import PveNode
from vmapipe.runtime.errors import Failure

CONF = """\
#notes of the user: lock: no
boot: order=scsi0
description: x
memory: 64
scsi0: local:100/vm-100-disk-0.raw

[before]
lock: snapshot
memory: 32
"""


def test_the_lock_stands_where_proxmox_writes_it() -> None:
    text = locked_text(CONF)
    assert text.splitlines()[2:5] == ["description: x", "lock: backup", "memory: 64"]
    assert locked_text("boot: x\n\n[s]\nmemory: 1\n") == "boot: x\nlock: backup\n\n[s]\nmemory: 1\n"
    assert locked_text("boot: x") == "boot: x\nlock: backup\n"
    assert locked_text("") == "lock: backup\n"


_LINE = st.sampled_from(
    [
        "#text",
        "boot: a",
        "memory: 1",
        "scsi0: x",
        "name: y",
        "",
        "[snap]",
        "[PENDING]",
        "zz",
        "cr\r",
        "#a\u2028lock: x",
    ]
)


@given(st.lists(_LINE, max_size=8))
def test_a_configuration_is_byte_for_byte_the_same_when_it_is_unlocked_again(
    lines: list[str],
) -> None:
    text = "".join(f"{line}\n" for line in lines)
    assert unlocked_text(locked_text(text)) == text
    assert MachineConfig(locked_text(text)).lock == "backup"


def other(node: SimulatedNode, *words: str) -> subprocess.CompletedProcess[str]:
    """Another process that takes the lock and is killed, or ends, at a point of its work."""
    program = f"""
import os, sys
from vmapipe.control.hosts.pve.lock import BackupLock
from vmapipe.control.hosts.pve.node import PveNode
import vmapipe.control.hosts.pve.lock as module
def die(*_, **__): os.kill(os.getpid(), 9)
lock = BackupLock(PveNode({str(node.root)!r}), 100)
{chr(10).join(words)}
"""
    return subprocess.run(
        [sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True
    )


@pytest.fixture
def host(node: SimulatedNode) -> PveNode:
    node.configure(100, CONF)
    return PveNode(str(node.root))


def test_a_machine_is_locked_and_unlocked_and_nothing_is_left(
    node: SimulatedNode, host: PveNode
) -> None:
    before = os.stat(node.configs / "100.conf").st_mode
    lock = BackupLock(host, 100)
    assert lock.take().text == CONF
    assert node.config(100) == locked_text(CONF)
    assert lock.release() == ""
    assert node.config(100) == CONF
    assert os.stat(node.configs / "100.conf").st_mode == before
    assert [path.name for path in node.configs.iterdir()] == ["100.conf"]
    assert list((node.root / "var/lib/vmapipe/pve").iterdir()) == []


#: Where a process is killed, and whether the machine is locked then.
STATES = {
    "before the note": (["lock._write_note = die", "lock.take()"], False),
    "before the file is there": (["os.rename = die", "lock.take()"], False),
    "before the note is complete": (
        [
            "real = lock._write_note",
            "lock._write_note = lambda n: die() if 'mtime_ns' in n else real(n)",
            "lock.take()",
        ],
        True,
    ),
    "during the backup": (["lock.take()", "die()"], True),
    "before it is unlocked": (["lock.take()", "os.rename = die", "lock.release()"], True),
    "after it is unlocked": (
        [
            "lock.take()",
            "real = lock._write_note",
            "lock._write_note = lambda n: real(n) if n else die()",
            "lock.release()",
        ],
        False,
    ),
}


@pytest.mark.parametrize(
    ("state", "by"),
    [
        *((state, "cleanup") for state in STATES),
        ("before the file is there", "the next backup"),
        ("during the backup", "the next backup"),
    ],
)
def test_what_a_killed_backup_leaves_is_removed(
    node: SimulatedNode, host: PveNode, state: str, by: str
) -> None:
    words, is_locked = STATES[state]
    done = other(node, *words)
    assert done.returncode == -9, done.stderr
    assert MachineConfig(node.config(100)).lock == ("backup" if is_locked else "")
    if by == "cleanup":
        assert BackupLock(host, 100).remove() is is_locked
    else:
        lock = BackupLock(host, 100)
        assert lock.take().text == CONF
        assert lock.was_left is is_locked
        assert lock.release() == ""
    assert node.config(100) == CONF
    assert [path.name for path in node.configs.iterdir()] == ["100.conf"]


@pytest.mark.parametrize("word", ["backup", "migrate", "snapshot", "clone", "suspended"])
def test_somebody_elses_lock_is_refused_and_stays(
    node: SimulatedNode, host: PveNode, word: str
) -> None:
    text = CONF.replace("memory: 64", f"lock: {word}\nmemory: 64")
    node.configure(100, text)
    lock = BackupLock(host, 100)
    with pytest.raises(Failure, match=rf"VM 100 is locked \({word}\).*`qm unlock 100`"):
        lock.take()
    lock.close()
    assert BackupLock(host, 100).remove() is False
    assert node.config(100) == text


def test_a_lock_that_vzdump_has_set_since_ours_was_removed_by_hand_is_its_own(
    node: SimulatedNode, host: PveNode
) -> None:
    """Even where the file has the same bytes: its time tells."""
    assert other(node, "lock.take()", "die()").returncode == -9
    node.configure(100, CONF)  # qm unlock
    node.configure(100, locked_text(CONF))  # vzdump
    os.utime(node.configs / "100.conf", (1, 1))
    lock = BackupLock(host, 100)
    with pytest.raises(Failure, match="is not one that vmapipe knows as its own"):
        lock.take()
    lock.close()
    assert BackupLock(host, 100).remove() is False
    assert node.config(100) == locked_text(CONF)


def test_a_configuration_that_was_changed_meanwhile_keeps_its_lock_and_it_is_told(
    node: SimulatedNode, host: PveNode
) -> None:
    lock = BackupLock(host, 100)
    lock.take()
    node.configure(100, locked_text(CONF).replace("memory: 64", "memory: 128"))
    assert "may be somebody else's now and stays" in lock.release()
    assert MachineConfig(node.config(100)).lock == "backup"


def test_a_lock_that_was_removed_meanwhile_is_told(node: SimulatedNode, host: PveNode) -> None:
    lock = BackupLock(host, 100)
    lock.take()
    node.configure(100, CONF)
    assert "somebody has removed its lock" in lock.release()
    assert node.config(100) == CONF


def test_a_backup_that_lives_keeps_its_lock(node: SimulatedNode, host: PveNode) -> None:
    lock = BackupLock(host, 100)
    lock.take()
    done = other(node, "lock.take()")
    assert "another vmapipe backup of VM 100 is running" in done.stderr
    assert node.config(100) == locked_text(CONF)
    lock.release()


def test_a_program_that_changes_the_configuration_is_waited_for(
    node: SimulatedNode, host: PveNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_WAIT_S", 0.3)
    path = Path(host.lock_path(100))
    path.parent.mkdir(parents=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        lock = BackupLock(host, 100)
        with pytest.raises(Failure, match="another program has changed VM 100's configuration"):
            lock.take()
        monkeypatch.setattr(lock_module, "_WAIT_S", 60.0)
        threading.Timer(0.3, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        lock.take()
        lock.release()
