# SPDX-License-Identifier: Apache-2.0
"""Verify's processes: what becomes of them never changes what is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.archives import archive, extents_of, manifest
from tests.machine import VMAPIPE, run
from tests.restore.support import CONFIGS, DISKS

RAW = archive(DISKS, CONFIGS, slots=2)

# In a process of its own: one without threads can fork.
PRELUDE = """
import os, signal, sys
import psutil
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.archive.digest import read_digest
from vmapipe.restore.verify.mapped import MappedHashers
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled

path = sys.argv[1]
fd = os.open(path, os.O_RDONLY)
done_here = []
def compute(offset, length):
    done_here.append(offset)
    return read_digest(PlainFile(path, None, fd, 0).read_into, offset, length)
cancel = Cancel()
hashers = MappedHashers(fd, 2, compute, cancel)
pids = [child.pid for child in psutil.Process().children()]
def kill(pid):
    os.kill(pid, signal.SIGKILL)  # SIGBUS would wait for one that stands still
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
"""


JOBS = [(512, 100_000), (3, 1), (65536, 200_000), (len(RAW) - 10, 10)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    path.with_name("vm.vma.manifest.json").write_bytes(manifest(RAW))
    return path


def outcome(path: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{PRELUDE}JOBS = {JOBS}\n{code}", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = """
results = [hashers.submit(*job) for job in JOBS]
same = [result() for result in results] == [compute(*job) for job in JOBS]
print(same, len(done_here) - len(JOBS))
hashers.close()
for pid in pids:
    assert not os.path.exists(f"/proc/{pid}")
"""


def test_digests_come_from_the_processes_at_any_offset(path: Path) -> None:
    assert outcome(path, ASK) == "True 0"


def test_what_killed_processes_leave_is_computed_here(path: Path) -> None:
    assert outcome(path, "kill(pids[0]); kill(pids[1])\n" + ASK) == "True 4"


def test_a_process_that_is_killed_at_its_work_takes_nothing_with_it(path: Path) -> None:
    # Both stand still with a job each, or before it; then one of them dies.
    hang = """
for pid in pids:
    os.kill(pid, signal.SIGSTOP)
results = [hashers.submit(*job) for job in JOBS]
kill(pids[1])
os.kill(pids[0], signal.SIGCONT)
print([result() for result in results] == [compute(*job) for job in JOBS])
"""
    assert outcome(path, hang) == "True"


def test_a_file_that_is_cut_gives_the_digest_of_what_is_there(path: Path) -> None:
    assert outcome(path, "os.truncate(path, 70_000)\n" + ASK).startswith("True")


def test_a_file_that_is_cut_while_it_is_looked_at_gives_the_digest_of_what_is_there(
    path: Path,
) -> None:
    # Mapped while it was whole: the look itself is what kills.
    code = """
import mmap, vmapipe.restore.verify.mapped as mapped
begin = mmap.mmap
def cut(*args, **words):
    mapping = begin(*args, **words)
    os.truncate(path, 70_000)
    return mapping
hashers.close()
mmap.mmap = cut
hashers = MappedHashers(fd, 2, compute, cancel)
pids = [child.pid for child in psutil.Process().children()]
"""
    assert outcome(path, code + ASK).startswith("True")


def test_a_wait_for_a_process_that_hangs_ends_when_a_stop_is_asked_for(path: Path) -> None:
    code = """
for pid in pids:
    os.kill(pid, signal.SIGSTOP)
result = hashers.submit(*JOBS[0])
cancel.ask("test")
try:
    result()
except Cancelled:
    print("cancelled")
hashers.close()
"""
    assert outcome(path, code) == "cancelled"


def test_the_processes_end_with_their_owner(path: Path) -> None:
    # They hold the pipe that `outcome` reads to its end: it waits for theirs.
    assert outcome(path, 'print("gone", flush=True); os._exit(0)') == "gone"


def test_the_command_finds_damage_and_where_it_is(path: Path) -> None:
    raw = bytearray(RAW)
    extent = extents_of(RAW)[1]
    raw[extent.offset + 600] ^= 1
    path.write_bytes(raw)
    done = run("verify", "--json", path, tool=VMAPIPE)
    assert done.returncode == 4
    verified = json.loads(done.stdout.splitlines()[-1])
    assert [find["archive_offset"] for find in verified["damage"]] == [extent.offset]
    assert verified["data_checked"]
