# SPDX-License-Identifier: Apache-2.0
"""Backups of a libvirt domain that are killed, whole or in part, and a libvirtd that is: the guest does not notice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.control.hosts.domain_backups import (
    GUARDIAN,
    PROXY,
    everybody,
    frozen_status,
    kill_together,
    processes_with,
    qemus_own,
    seldom,
    words_for,
)
from tests.control.hosts.libvirtd import DomainGuest
from tests.machine import LIMIT_S, end_of, eventually, good, next_event, started, without_limit


@pytest.mark.parametrize("victim", [*seldom("producer", "guardian"), "coordinator", "all"])
def test_a_domain_does_not_notice_that_its_backup_is_killed(
    domain: DomainGuest, tmp_path: Path, victim: str
) -> None:
    """Only what is killed as a whole leaves anything, which is found and removed."""
    archive = tmp_path / "vm.vma"
    with started(*words_for(domain, "--json", "--speed", "64K", archive)) as process:
        next_event(process, "begun")
        domain.goes_on(1)
        all_of_them = everybody(process, domain)
        match victim:
            case "all":
                victims = all_of_them
            case "coordinator":
                victims = [psutil.Process(process.pid)]
            case "guardian":
                victims = [p for p in all_of_them if GUARDIAN in str(p.cmdline())]
            case _:
                victims = [p for p in all_of_them if "vmapipe.producer.main" in str(p.cmdline())]
        assert victims
        kill_together(victims)
        domain.goes_on(2)
        assert end_of(process)[0] != 0
    _, alive = psutil.wait_procs(all_of_them, timeout=LIMIT_S)
    assert alive == []
    if victim == "all":
        libvirtd = domain.libvirtd
        where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
        said = good("cleanup", "--libvirt", domain.name, *where).decode()
        assert said.startswith("removed a backup job, ")
        assert good("cleanup", "--libvirt", domain.name, *where) == b"there was nothing to remove\n"
    domain.is_untouched()
    domain.goes_on(1)


@pytest.mark.soak
def test_a_domain_does_not_notice_a_hundred_backups_that_are_killed_at_random(
    domain: DomainGuest, tmp_path: Path
) -> None:
    """At any moment, some or all of the processes; each next backup removes what the one before has left."""
    chance = random.Random(16)
    libvirtd = domain.libvirtd
    xml = libvirtd("dumpxml", domain.name)
    for number in range(100):
        archive = tmp_path / f"{number}.vma"
        more = ("--freeze",) if chance.random() < 0.3 else ()
        words = words_for(domain, "--json", "--speed", "8M", *more, archive)
        with started(*words) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.0, 4.0))
            there = everybody(process, domain)
            count = len(there) if chance.random() < 0.4 else 1
            kill_together(chance.sample(there, min(count, len(there))))
            if count > 1:
                # Nobody is left who could thaw a guest that was just being frozen.
                good("cleanup", *words[1:7])
            domain.goes_on(1)
            end_of(process)
        archive.unlink(missing_ok=True)
    good(*words_for(domain, tmp_path / "last.vma"))
    assert eventually(lambda: not processes_with(GUARDIAN, domain))
    assert frozen_status(domain) == "thawed"
    assert libvirtd("dumpxml", domain.name) == xml
    domain.goes_on(2)
    domain.is_untouched()


@pytest.mark.parametrize("who", ["the backup", "everybody"])
def test_a_guest_is_thawed_whoever_is_killed_while_it_is_frozen(
    domain: DomainGuest, who: str
) -> None:
    """Where everybody was killed at once, by the next one that comes."""
    libvirtd = domain.libvirtd
    victims = "others + [me]" if who == "everybody" else "[me]"
    program = f"""
import os, psutil
from vmapipe.control.hosts.libvirt.running import DomainBackup, Wishes
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import ignore
scratch = {str(libvirtd.scratch)!r}
backup = DomainBackup(Wishes({domain.name!r}, {libvirtd.uri!r}, scratch, freezes=True))
backup.choose()
with backup._frozen(ignore, Cancel()):
    print("frozen", flush=True)
    me = psutil.Process()
    others = me.children()
    for process in {victims}:
        process.kill()
"""
    words = [sys.executable, "-P", "-c", program]
    done = subprocess.run(words, timeout=LIMIT_S, capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"frozen\n"), done.stderr
    if who == "everybody":
        assert frozen_status(domain) == "frozen"
        where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
        said = good("cleanup", "--libvirt", domain.name, *where).decode()
        assert said.startswith("removed the freezing of the guest's file systems, ")
    assert eventually(lambda: frozen_status(domain) == "thawed")
    domain.goes_on(2)
    assert eventually(lambda: not list(libvirtd.scratch.iterdir()))
    domain.is_untouched()


def test_a_libvirtd_that_is_killed_and_started_again_costs_nothing(
    domain: DomainGuest, tmp_path: Path
) -> None:
    libvirtd, archive = domain.libvirtd, tmp_path / "vm.vma"
    with started(*words_for(domain, "--json", "--speed", "64K", archive)) as process:
        next_event(process, "instant")
        libvirtd.kill()
        domain.goes_on(1)
        libvirtd.start()
        domain.goes_on(1)
        assert process.poll() is None
        without_limit(process)
        assert end_of(process) == (0, "")
    good("verify", archive)
    domain.is_untouched()


@pytest.mark.parametrize("victim", ["coordinator", *seldom("proxy")])
def test_with_push_too_a_domain_does_not_notice_that_its_backup_is_killed(
    domain: DomainGuest, tmp_path: Path, victim: str
) -> None:
    archive = tmp_path / "vm.vma"
    with started(*words_for(domain, "--json", "--push", "--speed", "64K", archive)) as process:
        next_event(process, "begun")
        domain.goes_on(1)
        if victim == "coordinator":
            process.kill()
        else:
            kill_together(processes_with(PROXY, domain))
        domain.goes_on(2)
        assert end_of(process)[0] != 0
    if victim == "proxy":
        # The jobs end by themselves, their data dropped; the next backup removes what is left.
        good(*words_for(domain, "--push", tmp_path / "next.vma"))
    assert eventually(lambda: '"vmapipe-' not in qemus_own(domain))
    assert eventually(lambda: not processes_with(PROXY, domain))
    domain.goes_on(1)
    domain.is_untouched()
