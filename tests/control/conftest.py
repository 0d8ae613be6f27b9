# SPDX-License-Identifier: Apache-2.0
"""The machines that several files' tests back up: a booted guest, a storage daemon."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.control.qemu.daemon_backup import SIZES
from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.running_guest import RunningGuest, make_images, running_guest
from tests.control.qemu.storage_daemon import StorageDaemon, storage_daemon
from tests.control.qemu.versions import FETCHED, INSTALLED, programs_of
from tests.guest import Kernel, find_kernel
from tests.machine import Need
from vmapipe.runtime.cancel import Cancel


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that has the fixture `qemu` is run with each QEMU.

    With the newer ones in `make soak` only, unless it is marked `every_qemu`: quick, and about
    what QEMUs differ in. Then it is run with the newest by `make test`, too; the one between has no
    way of its own (up to 10.0 as 7.2, see docs/decisions/0022), and is for `make soak`.
    """
    if "qemu" not in metafunc.fixturenames:
        return
    always = metafunc.definition.get_closest_marker("every_qemu") is not None
    newer = [
        pytest.param(suite, marks=() if always and suite == FETCHED[-1] else pytest.mark.soak)
        for suite in FETCHED
    ]
    metafunc.parametrize("qemu", [INSTALLED, *newer], indirect=True, scope="module")


@pytest.fixture(scope="module")
def qemu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which QEMU it is; its programs are the first that are found meanwhile."""
    suite = str(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if suite != INSTALLED:
            folder = programs_of(suite)
            if not (folder / "qemu-system-x86_64").exists():
                absent(f"the QEMU of Debian's {suite}; scripts/newer-qemus fetches it")
            patch.setenv("PATH", f"{folder}:{os.environ.get('PATH', os.defpath)}")
        yield suite


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = find_kernel()
    if found is None:
        absent("a kernel for a guest; scripts/setup unpacks Debian's into .venv/kernel")
    return found


@pytest.fixture(scope="module")
def images(need: Need, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of `guest`."""
    return make_images(need, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def guest(
    qemu: str,
    need: Need,
    kernel: Kernel,
    images: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningGuest]:
    """One for all tests of a file: each leaves it running. Booting takes longer than most."""
    with running_guest(need, kernel, tmp_path_factory.mktemp("guest"), images) as running:
        running.next_round()
        yield running


@pytest.fixture
def contents() -> dict[str, bytes]:
    """Data, zeroes, and the last cluster in part."""
    chance = random.Random(11)
    found = {}
    for name, size in SIZES.items():
        clusters = (
            chance.randbytes(CLUSTER) if chance.random() < 0.7 else bytes(CLUSTER)
            for _ in range(-(-size // CLUSTER))
        )
        found[name] = b"".join(clusters)[:size]
    return found


@pytest.fixture
def daemon(
    qemu: str, need: Need, tmp_path: Path, contents: dict[str, bytes]
) -> Iterator[StorageDaemon]:
    need("qemu-storage-daemon")
    images = {}
    for name, content in contents.items():
        images[name] = tmp_path / f"{name}.raw"
        images[name].write_bytes(content)
    with storage_daemon(tmp_path, **images) as machine:
        yield machine


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets are, and nothing else."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def cancel() -> Iterator[Cancel]:
    cancel = Cancel()
    yield cancel
    cancel.close()
