# SPDX-License-Identifier: Apache-2.0
"""Each block of commands in the sessions of docs/operations/access.md, run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.access.mounting import need_fuse
from tests.access.sessions import FSTAB, Session, make_archives, run_session, sessions
from tests.machine import Need, sha256

# A store of their own: tests/s3/test_serve.py runs these.
HERE = [session for session in sessions() if "s3://" not in session.script]
# Large, or of the kernel: never installed for a test, so these are tried by `make soak` where they are.
OPTIONAL = ("guestfish", "virt-v2v", "modprobe nbd")
# What the output has to have, by a word of the title.
EXPECTED = {
    "dead host": "/dev/vda1 / ext4",
    "LVM": FSTAB + FSTAB,
    "folder": "memory: 512",
    "configuration": "\nmemory: 512\n",
    "qemu-nbd": "hole,zero",
    "qcow2": "No errors were found",
    "Compare": "Images are identical",
    "three": "disk-drive-scsi2.raw",
    "still in the archive": "No errors were found",
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Path:
    folder = tmp_path_factory.mktemp("sessions")
    make_archives(folder, need)
    return folder


def name_of(session: Session) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", session.title.lower()).strip("-")
    return f"{words}-{session.number}"


def check_programs(script: str, need: Need) -> None:
    if "mount " in script:
        need_fuse()
        need("fusermount3")
    for program in OPTIONAL[:2]:
        if re.search(rf"^{program} ", script, re.MULTILINE) and shutil.which(program) is None:
            pytest.skip(f"not installed: {program}")
    if "modprobe nbd" in script and not os.path.exists("/sys/module/nbd"):
        pytest.skip("the kernel's module nbd is not loaded")
    need(*set(re.findall(r"^(qemu-img|qemu-io|nbdinfo|nbdcopy) ", script, re.MULTILINE)))


def everywhere(session: Session) -> object:
    is_optional = any(re.search(rf"^{what} ", session.script, re.MULTILINE) for what in OPTIONAL)
    return pytest.param(session, marks=pytest.mark.soak if is_optional else ())


@pytest.mark.parametrize("session", [everywhere(session) for session in HERE], ids=name_of)
def test_a_session_of_the_page_runs_as_it_stands_there(
    session: Session, archives: Path, short_folder: Path, need: Need
) -> None:
    check_programs(session.script, need)
    done = run_session(session.script, short_folder, archives)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert b"Traceback" not in done.stderr
    said = done.stdout.decode()
    for word, expected in EXPECTED.items():
        if word in session.title and session.number == 1:
            assert expected in said
    if (short_folder / "copy.raw").exists():
        assert sha256(short_folder / "copy.raw") == sha256(archives / "drive-scsi0.raw")


def test_there_are_ten_sessions_and_each_is_looked_at() -> None:
    titles = {session.title for session in sessions()}
    assert len(titles) >= 10
    assert all(any(word in title for title in titles) for word in EXPECTED)
