# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests, and the checks that every test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol

import pytest
from hypothesis import settings

from tests import leaks
from tests.golden_archives import GoldenItem, read_digests, unpack_all
from tests.machine import COPIES, run

ON_CI = os.environ.get("CI") == "true"

# On CI the same examples every time, and no deadline: its machines stall at will.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("dev", deadline=None, max_examples=100)
settings.load_profile("ci" if ON_CI else "dev")


# Under nohup or in a shell's background these are ignored, and every program that
# a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """The collector need not look through thousands of tests again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    COPIES.close()


def absent(what: str) -> NoReturn:
    """A user's machine may lack it, and the test is skipped; CI has everything, and it fails."""
    reason = f"not installed: {what}"
    if ON_CI:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def need() -> Callable[..., list[str]]:
    """The paths of programs: `img, nbd = need("qemu-img", "qemu-nbd")`."""

    def find(*programs: str) -> list[str]:
        # A user's PATH often lacks the folders where mkfs and losetup are.
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        found = {program: shutil.which(program, path=path) for program in programs}
        missing = [program for program, place in found.items() if place is None]
        if missing:
            absent(", ".join(missing))
        return [place for place in found.values() if place is not None]

    return find


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_folder() -> Iterator[None]:
    """The sockets of the tests' backups are not where the machine's own are."""
    with tempfile.TemporaryDirectory(prefix="vmapipe-test-") as folder:
        os.environ["VMAPIPE_RUNTIME_DIR"] = folder
        yield


@pytest.fixture
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the backups of one test have their sockets; it is not there yet.

    Its path is short whatever the test is called: a socket's has 107 bytes at most.
    """
    with tempfile.TemporaryDirectory(prefix="vmapipe-test-") as folder:
        path = Path(folder) / "run"
        monkeypatch.setenv("VMAPIPE_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """An empty folder for a TMPDIR: sockets are made in it, as its path is short."""
    with tempfile.TemporaryDirectory(prefix="vmapipe-t-") as folder:
        yield Path(folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for the archive, or the disks: whatever is in it at the end was left there."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference tool's archives, unpacked. Read them only."""
    folder = tmp_path_factory.mktemp("golden")
    unpack_all(folder)
    return folder


@pytest.fixture(scope="session")
def golden_digests() -> dict[str, list[GoldenItem]]:
    """What every golden archive holds, by the archive's name ("g01-rfc.vma")."""
    return read_digests()


@pytest.fixture(autouse=True)
def _leaves_no_process() -> Iterator[None]:
    before = leaks.child_processes()
    yield
    left = leaks.left_after_grace(lambda: leaks.child_processes() - before)
    if left:
        report = "\n".join(sorted(map(leaks.describe_process, left)))
        leaks.kill(left)
        pytest.fail(f"the test left child processes:\n{report}", pytrace=False)


@pytest.fixture(autouse=True)
def _leaves_no_descriptor(_leaves_no_process: None) -> Iterator[None]:
    before = leaks.open_descriptors()
    yield
    left = leaks.left_after_grace(lambda: leaks.new_descriptors(before))
    if left:
        report = "\n".join(f"{number}: {target}" for number, target in sorted(left.items()))
        pytest.fail(f"the test left file descriptors open:\n{report}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _leaves_no_orphan() -> Iterator[None]:
    """Processes whose parents died first escape the check after each test: look once at the end."""
    yield
    left = leaks.left_after_grace(lambda: leaks.processes_of_run(COPIES.run_id))
    if left:
        report = "\n".join(f"{leaks.describe_process(p)}, from {test}" for p, test in left.items())
        leaks.kill(left)
        pytest.fail(f"the tests left processes:\n{report}", pytrace=False)


class CopyHere(Protocol):
    def __call__(self, *words: str | Path, code: int = 0) -> str: ...


@pytest.fixture
def copy_here() -> CopyHere:
    """`vmapipe copy`, with what the test has replaced; returns what it says."""

    def copy(*words: str | Path, code: int = 0) -> str:
        done = run("copy", *words, as_patched=True)
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == code, said
        return said

    return copy
