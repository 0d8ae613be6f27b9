# SPDX-License-Identifier: Apache-2.0
"""One libvirtd, and one domain that boots, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.control.hosts.bench import WEB, Bench
from tests.control.hosts.libvirtd import DomainGuest, Libvirtd, booted_domain, started_libvirtd
from tests.control.qemu.agent import find_agent
from tests.control.qemu.running_guest import make_images
from tests.guest import find_kernel
from tests.machine import Need, make_disk
from vmapipe.control.hosts.libvirt.connect import Library
from vmapipe.runtime.errors import Failure


@pytest.fixture(scope="module")
def libvirtd(need: Need) -> Iterator[Libvirtd]:
    daemon, virsh = need("libvirtd", "virsh")
    try:
        Library.find()
    except Failure:
        absent("libvirt's library for this Python; Debian's python3-libvirt is for its own")
    with started_libvirtd(daemon, virsh) as libvirtd:
        yield libvirtd


@pytest.fixture(scope="module")
def domain(need: Need, libvirtd: Libvirtd) -> Iterator[DomainGuest]:
    agent = find_agent()
    if agent is None:
        absent("a guest agent; scripts/setup unpacks Debian's into .venv/guest-agent")
    if find_kernel() is None:
        absent("a kernel for a guest; scripts/setup unpacks Debian's into .venv/kernel")
    folder = libvirtd.folder / "images"
    folder.mkdir()
    disks = make_images(need, folder)
    libvirtd.give(folder)
    with booted_domain(libvirtd, need, agent, "vm1", disks) as guest:
        yield guest


@pytest.fixture(scope="module")
def bench(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    daemon, virsh = need("libvirtd", "virsh")
    need("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img")
    with started_libvirtd(daemon, virsh) as libvirt, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(libvirt.folder / "state"))
        patch.setenv("VMAPIPE_ACCELERATOR", "tcg")
        bench = Bench(libvirt, libvirt.folder / "pool", tmp_path_factory.mktemp("archives"))
        bench.pool.mkdir()
        libvirt.give(bench.pool)
        libvirt("pool-create-as", "p", "dir", "--target", bench.pool)
        yield bench


@pytest.fixture(scope="module")
def small(bench: Bench) -> Path:
    """An archive of web with a disk of a few clusters."""
    disk = make_disk(bench.folder / "small.raw", "AhA0ppA" * 8)
    return bench.archive("small.vma", WEB, f"vda={disk}")


@pytest.fixture(scope="module")
def large(bench: Bench) -> Path:
    """One of which a restore at a low speed is still under way when something happens to it."""
    disk = make_disk(bench.folder / "large.raw", "A" * 256)
    return bench.archive("large.vma", WEB, f"vda={disk}")
