# SPDX-License-Identifier: Apache-2.0
"""Hooks of real backups: a shell script that writes down how it was called."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.machine import bad, end_of, eventually, good, make_disk, run, started
from tests.producer.guard.serving import serving

LIMIT_S = 60


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", "A0h")


def hook(tmp_path: Path, more: str = "") -> Path:
    """Writes each call to the file `calls`; `more` runs afterwards, with $1 the phase."""
    script = tmp_path / "hook"
    line = f"{tmp_path}/calls"
    script.write_text(f'#!/bin/sh\necho "$#:$*" >> {line}\n{more}\n')
    script.chmod(0o755)
    return script


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


ENDED = ["3:log-end stop ", "1:job-end"]


def test_a_good_backup_calls_the_phases_in_vzdumps_order(tmp_path: Path, disk: Path) -> None:
    good("backup", "--hook", hook(tmp_path), "--disk", f"d={disk}", tmp_path / "vm.vma")
    begun = ["1:job-start", "3:backup-start stop "]
    assert calls(tmp_path) == [*begun, "3:backup-end stop ", *ENDED]


def test_a_disk_in_use_also_has_its_instant_and_the_vmid_is_handed_on(
    tmp_path: Path, disk: Path
) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    with serving(tmp_path, d=disk) as served:
        words = ("--monitor", served.monitor, "--vmid", "100", dump)
        good("backup", "--hook", hook(tmp_path), *words)
    names = ["job-start", "backup-start", "snapshot-taken", "backup-end", "log-end", "job-end"]
    assert [call.split(":")[1].split()[0] for call in calls(tmp_path)] == names
    assert calls(tmp_path)[2] == "3:snapshot-taken snapshot 100"


def test_the_environment_says_what_vzdumps_says_and_more(tmp_path: Path, disk: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    script = hook(tmp_path, f"env > {tmp_path}/env-$1")
    good("backup", "--hook", script, "--vmid", "100", "--disk", f"drive-scsi0={disk}", dump)

    def environment(phase: str) -> dict[str, str]:
        lines = (tmp_path / f"env-{phase}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    start, end, last = map(environment, ("backup-start", "backup-end", "log-end"))
    (archive,) = dump.glob("*.vma")
    assert start["VMTYPE"] == "qemu"
    assert start["DUMPDIR"] == str(dump)
    assert "TARGET" not in start
    assert "LOGFILE" not in start
    assert end["TARGET"] == end["VMAPIPE_ARCHIVE"] == str(archive)
    assert end["VMAPIPE_STATUS"] == "done"
    assert end["VMAPIPE_STORED_BYTES"] == str(archive.stat().st_size)
    assert end["VMAPIPE_TOTAL_BYTES"] == str(3 * 65536)
    assert last["LOGFILE"] == str(archive.with_suffix(".log"))
    assert "Finished Backup of VM 100" in Path(last["LOGFILE"]).read_text()


@pytest.mark.parametrize("phase", ["job-start", "backup-start"])
def test_a_hook_that_fails_before_the_backup_ends_it(
    tmp_path: Path, disk: Path, phase: str
) -> None:
    script = hook(tmp_path, f'echo no room; [ "$1" != {phase} ]')
    done = run("backup", "--hook", script, "--disk", f"d={disk}", tmp_path / "vm.vma")
    assert done.returncode == 1
    assert done.stderr.decode() == f"vmapipe backup: hook {phase} failed: exit code 1\n"
    assert f"hook {phase}: no room" in done.stdout.decode()
    assert not list(tmp_path.glob("vm.vma*"))
    aborted = ["1:job-abort"] if phase == "job-start" else ["3:backup-abort stop ", *ENDED]
    assert calls(tmp_path)[-len(aborted) :] == aborted


def test_a_hook_that_fails_at_the_end_is_told_and_the_archive_is_there(
    tmp_path: Path, disk: Path
) -> None:
    script = hook(tmp_path, '[ "$1" != backup-end ]')
    out = good("backup", "--hook", script, "--disk", f"d={disk}", tmp_path / "vm.vma")
    assert b"hook backup-end failed: exit code 1" in out
    assert (tmp_path / "vm.vma").exists()


def test_a_failed_backup_calls_backup_abort_with_its_reason(tmp_path: Path) -> None:
    script = hook(tmp_path, f'echo "$VMAPIPE_ERROR" > {tmp_path}/why-$1')
    words = ("--disk", f"d={tmp_path / 'none'}", tmp_path / "vm.vma")
    bad("backup", "--quiet", "--hook", script, *words)
    assert "No such file or directory" in (tmp_path / "why-backup-abort").read_text()
    assert calls(tmp_path)[-3:] == ["3:backup-abort stop ", *ENDED]


def test_a_hook_that_takes_too_long_is_ended_with_all_it_started(
    tmp_path: Path, disk: Path
) -> None:
    script = hook(tmp_path, f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    # A busy machine has begun it within that time.
    words = ("--hook-timeout", "4", "--disk", f"d={disk}", tmp_path / "vm.vma")
    text = bad("backup", "--hook", script, *words)
    assert "hook job-start: not done within 4 s, so it was ended" in text
    assert eventually(lambda: has_ended(int((tmp_path / "pid").read_text())))


def has_ended(pid: int) -> bool:
    """Whether it was waited for is the affair of whoever adopts orphans here."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_cancelled_backup_does_not_wait_for_its_hook(tmp_path: Path, disk: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    script = hook(tmp_path, f'[ "$1" = job-start ] && echo > {tmp_path}/ready && exec sleep 600')
    words = ("--hook", script, "--disk", f"d={disk}", tmp_path / "vm.vma")
    with started("backup", *words) as backup:
        (tmp_path / "ready").read_text()
        backup.send_signal(signal.SIGTERM)
        assert end_of(backup) == (143, "vmapipe backup: cancelled by SIGTERM")


@pytest.mark.parametrize("phase", ["job-start", "snapshot-taken"])
def test_a_hook_and_all_it_started_end_with_a_coordinator_that_is_killed(
    tmp_path: Path, disk: Path, phase: str
) -> None:
    os.mkfifo(tmp_path / "ready")
    wait = f"sleep 600 & echo $$ $! > {tmp_path}/ready; wait"
    script = hook(tmp_path, f'[ "$1" != {phase} ] || {{ {wait}; }}')
    with serving(tmp_path, d=disk) as served:
        words = ("--hook", script, "--monitor", served.monitor, tmp_path / "vm.vma")
        with started("backup", *words) as backup:
            pids = map(int, (tmp_path / "ready").read_text().split())
            processes = [psutil.Process(pid) for pid in pids]
            assert len(processes) == 2
            backup.kill()
            assert psutil.wait_procs(processes, timeout=LIMIT_S)[1] == []


def test_a_hook_that_waits_for_all_its_children_waits_for_its_own_only(
    tmp_path: Path, disk: Path
) -> None:
    script = tmp_path / "hook"
    script.write_text(f"#!{sys.executable}\nimport os\ntry:\n  os.wait()\nexcept OSError: pass\n")
    script.chmod(0o755)
    good("backup", "--hook", script, "--disk", f"d={disk}", tmp_path / "vm.vma")


def test_what_a_hook_leaves_in_the_background_on_purpose_goes_on(
    tmp_path: Path, disk: Path
) -> None:
    script = hook(tmp_path, f'[ "$1" != job-end ] || {{ sleep 600 & echo $! > {tmp_path}/pid; }}')
    good("backup", "--hook", script, "--disk", f"d={disk}", tmp_path / "vm.vma")
    left = psutil.Process(int((tmp_path / "pid").read_text()))
    # The shell's child is the shell until it has become its program.
    assert eventually(lambda: left.name() == "sleep")
    left.kill()


def test_words_of_a_hook_never_go_into_an_archive_on_standard_output(
    tmp_path: Path, disk: Path
) -> None:
    script = hook(tmp_path, "echo CHATTER")
    done = run("backup", "--hook", script, "--disk", f"d={disk}", "-")
    assert done.returncode == 0
    assert done.stdout.startswith(b"VMA\0")
    assert b"CHATTER" not in done.stdout
    assert b"hook backup-start: CHATTER" in done.stderr


def test_a_program_that_is_not_there_is_wrong_use(tmp_path: Path, disk: Path) -> None:
    text = bad("backup", "--hook", "/no/such", "--disk", f"d={disk}", tmp_path / "a", code=2)
    assert "--hook /no/such: no program of this name can be run" in text
