# SPDX-License-Identifier: Apache-2.0
"""`vmapipe doctor --libvirt`: a domain, running and shut off."""

from __future__ import annotations

from tests.control.hosts.examined import examined, topics
from tests.control.hosts.libvirtd import Libvirtd, disk_xml, domain_xml
from tests.machine import Need, bad


def test_a_domain_is_looked_at_over_a_connection_that_only_reads(
    libvirtd: Libvirtd, need: Need
) -> None:
    (qemu,) = need("qemu-system-x86_64")
    folder = libvirtd.folder / "doctor"
    folder.mkdir()
    for name in ("a.raw", "b.raw"):
        (folder / name).write_bytes(bytes(1 << 20))
    libvirtd.give(folder)
    devices = disk_xml("vda", folder / "a.raw")
    devices += disk_xml("vdb", folder / "b.raw", more="<readonly/>")
    libvirtd.define(domain_xml(libvirtd, qemu, "patient", devices))
    # The socket for reading lies beside the other one.
    words = ("--libvirt", "patient", "--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    at_rest = examined(*words)
    assert [d["name"] for d in at_rest["disks"]] == ["vda"]
    libvirtd("start", "patient", "--paused")
    try:
        before = libvirtd("dumpxml", "patient")
        found = examined(*words)
        assert [(d["name"], d["bytes"]) for d in found["disks"]] == [("vda", 1 << 20)]
        assert [d["name"] for d in found["left_out"]] == ["vdb"]
        assert libvirtd("dumpxml", "patient") == before
        missing = (*words[:-1], folder / "none")
        assert topics(examined(*missing, code=1), "problem") == ["scratch space"]
    finally:
        libvirtd("destroy", "patient")
    assert "has no domain" in bad("doctor", "--libvirt", "nobody", *words[2:4])
