# SPDX-License-Identifier: Apache-2.0
"""The machines that several files' tests back up: a booted guest, a storage daemon."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.guard.guest import Kernel, find_kernel
from tests.machine import Need
from tests.qemu.daemon_backup import SIZES
from tests.qemu.hammer import CLUSTER
from tests.qemu.running_guest import RunningGuest, make_images, running_guest
from tests.qemu.storage_daemon import StorageDaemon, storage_daemon
from vmapipe.runtime.cancel import Cancel


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
def daemon(need: Need, tmp_path: Path, contents: dict[str, bytes]) -> Iterator[StorageDaemon]:
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
