# SPDX-License-Identifier: Apache-2.0
"""One libvirtd, and one domain that boots, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import absent
from tests.control.hosts.libvirtd import (
    DomainGuest,
    Libvirtd,
    booted_domain,
    started_libvirtd,
)
from tests.control.qemu.agent import find_agent
from tests.control.qemu.running_guest import make_images
from tests.guest import find_kernel
from tests.machine import Need
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
