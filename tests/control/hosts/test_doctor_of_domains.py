# SPDX-License-Identifier: Apache-2.0
"""`vmapipe doctor --libvirt`: a domain, running and shut off."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from xml.sax.saxutils import escape

from tests.control.hosts.examined import examined, topics
from tests.control.hosts.libvirtd import Libvirtd, disk_xml, domain_xml
from tests.machine import LIMIT_S, Need, bad, good


def test_a_domain_is_looked_at_over_a_connection_that_only_reads(
    libvirtd: Libvirtd, need: Need
) -> None:
    qemu, qemu_img = need("qemu-system-x86_64", "qemu-img")
    folder = libvirtd.folder / "doctor"
    folder.mkdir()
    for name in ("a.raw", "b.raw"):
        (folder / name).write_bytes(b"x" * (1 << 20))
    base, top = folder / "base.qcow2", folder / "top & 'top'.qcow2"
    convert = ["convert", "-O", "qcow2", folder / "a.raw", base]
    create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top]
    for image_words in (convert, create):
        subprocess.run([qemu_img, *map(str, image_words)], check=True, timeout=LIMIT_S)
    os.truncate(base, base.stat().st_size - (1 << 19))
    libvirtd.give(folder)
    devices = disk_xml("vda", Path(escape(str(top), {"'": "&apos;"})), "qcow2")
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
        assert "images" in topics(found, "warning")
        (text,) = [f["text"] for f in found["findings"] if f["topic"] == "images"]
        assert text.startswith(f"disk 'vda': the image '{base}', which QEMU has open, is truncated")
        backup = good("backup", "--json", *words, folder / "patient.vma")
        told = [e["text"] for e in map(json.loads, backup.splitlines()) if e["event"] == "notice"]
        assert text in told
        missing = (*words[:-1], folder / "none")
        assert topics(examined(*missing, code=1), "problem") == ["scratch space"]
    finally:
        libvirtd("destroy", "patient")
    assert "has no domain" in bad("doctor", "--libvirt", "nobody", *words[2:4])
