# SPDX-License-Identifier: Apache-2.0
"""The guest that several files' tests back up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ON_CI
from tests.guard.guest import Kernel, find_kernel
from tests.qemu.running_guest import Need, RunningGuest, make_images, running_guest


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = find_kernel()
    if found is None:
        reason = "no kernel for a guest: scripts/setup unpacks Debian's into .venv/kernel"
        if ON_CI:
            pytest.fail(reason)
        pytest.skip(reason)
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
