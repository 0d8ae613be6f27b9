# SPDX-License-Identifier: Apache-2.0
"""Backups of a libvirt domain, their processes, and what their archives say."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from _pytest.mark import ParameterSet

from tests.control.hosts.libvirtd import DomainGuest
from tests.control.qemu.running_guest import is_clean
from tests.machine import Need, good

GUARDIAN = "vmapipe.control.hosts.libvirt.guardian"
PROXY = "vmapipe.control.hosts.libvirt.monitor_proxy"


def seldom(*cases: str | tuple[str, str]) -> list[ParameterSet]:
    """Cases of which the others are the harder ones: they are for `make soak`."""
    each = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.soak) for values in each]


def words_for(domain: DomainGuest, *more: str | Path) -> tuple[str | Path, ...]:
    libvirtd = domain.libvirtd
    where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    return ("backup", "--libvirt", domain.name, *where, *more)


def processes_with(word: str, domain: DomainGuest) -> list[psutil.Process]:
    """All with `word` in their command line, for this domain: a guardian is nobody's child later.

    Other tests, which run beside this one, have domains of the same name behind other daemons.
    """
    where = f"--connect={domain.libvirtd.uri}"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if where in words and any(word in part for part in words):
                found.append(process)
    return found


def everybody(backup: subprocess.Popen[bytes], domain: DomainGuest) -> list[psutil.Process]:
    """All processes of a backup."""
    found = set(processes_with(GUARDIAN, domain))
    with suppress(psutil.NoSuchProcess):  # it may be done
        ours = psutil.Process(backup.pid)
        found |= {ours, *ours.children(recursive=True)}
    return sorted(found, key=lambda process: process.pid)


def kill_together(victims: list[psutil.Process]) -> None:
    """None of them has a moment to see that another is dead."""
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for victim in victims:
            with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                act(victim)


def instant_of(need: Need, archive: Path, folder: Path) -> int:
    """The round that both disks show, and the file system is sound."""
    (debugfs,) = need("debugfs")
    good("restore", archive, folder)
    system, counter = (folder / f"disk-{name}.raw" for name in ("vda", "vdb"))
    assert is_clean(need, system)
    words = [debugfs, "-R", "cat /counter", str(system)]
    file = int(subprocess.run(words, capture_output=True, check=True).stdout)
    sector = int(counter.read_bytes()[:8])
    assert file in (sector, sector - 1)
    return sector


def frozen_status(domain: DomainGuest) -> str:
    """As the agent sees it."""
    line = '{"execute": "guest-fsfreeze-status"}'
    answer = json.loads(domain.libvirtd("qemu-agent-command", domain.name, line))
    return str(answer["return"])


def qemus_own(domain: DomainGuest) -> str:
    """All names of jobs, nodes and objects in its QEMU."""
    commands = ("query-jobs", "query-named-block-nodes", "query-block-exports")
    lines = [f'{{"execute": "{command}"}}' for command in commands]
    lines.append('{"execute": "qom-list", "arguments": {"path": "/objects"}}')
    return "".join(domain.libvirtd("qemu-monitor-command", domain.name, line) for line in lines)
