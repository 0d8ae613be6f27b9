# SPDX-License-Identifier: Apache-2.0
"""Configurations that somebody made up to harm the host: a valid and harmless domain comes of each, or words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.access.machine.domains import RICH, RICH_DEVICES, finished, root_of, words_of
from vmapipe.access.machine.domain import draft_of_libvirt
from vmapipe.access.machine.domain_xml import render_xml
from vmapipe.access.machine.proxmox_domain import draft_of_proxmox
from vmapipe.access.machine.spec import MachineConfigError

_EVIL = "/dev/EVIL"
_TAGS = re.findall(r"<([a-zA-Z_:]+)", RICH)


def _mutated(xml: str, changes: Sequence[tuple[int, int]]) -> str:
    """The text with values taken out, doubled, or replaced by a hostile one, at random places."""
    for place, kind in changes:
        found = [*re.finditer(r"='([^']*)'|>([^<>]+)<|<(\w+)[^<>]*/>", xml)]
        match = found[place % len(found)]
        start, end = match.span(1) if match[1] is not None else match.span(2)
        if match[3] is not None:
            piece = ("", match[0] * 2, f"<{match[3]} x='{_EVIL}'/>")[kind]
            xml = xml[: match.start()] + piece + xml[match.end() :]
        else:
            xml = xml[:start] + ("", _EVIL, "7")[kind] + xml[end:]
    return xml


def test_any_domain_becomes_a_valid_and_harmless_one_or_is_refused_in_words(
    validates: Callable[[Sequence[str]], None],
) -> None:
    made: list[str] = []
    refusals: list[str] = []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2)), max_size=6))
    def try_one(changes: list[tuple[int, int]]) -> None:
        raw = _mutated(RICH, changes).encode()
        try:
            xml = finished(draft_of_libvirt(raw, RICH_DEVICES)).xml
        except MachineConfigError as error:
            refusals.append(str(error))
            return
        root = root_of(xml)
        assert [word for word in words_of(root) if _EVIL in word] == []
        assert render_xml(root) == xml
        made.append(xml)

    try_one()
    assert [text for text in refusals if not text.isprintable()] == []
    validates(made)


_KEYS = st.sampled_from(
    [
        "args",
        "hookscript",
        "name",
        "memory",
        "cores",
        "sockets",
        "cpu",
        "machine",
        "bios",
        "efidisk0",
        "tpmstate0",
        "scsihw",
        "scsi0",
        "scsi1",
        "scsi30",
        "virtio0",
        "virtio15",
        "sata0",
        "sata5",
        "ide0",
        "ide2",
        "net0",
        "net1",
        "net31",
        "vga",
        "serial0",
        "boot",
        "bootdisk",
        "agent",
        "rng0",
        "watchdog",
        "smbios1",
        "hostpci0",
        "usb0",
        "ostype",
        "balloon",
        "kvm",
        "acpi",
        "tablet",
        "audio0",
        "onboot",
        "arch",
        "vcpus",
    ]
)
_PIECES = st.sampled_from(
    [
        "x",
        "/dev/EVIL",
        "EVIL",
        "1",
        "2",
        "512",
        "q35",
        "pc",
        "ovmf",
        "host",
        "kvm64",
        "x86-64-v3",
        "virtio-scsi-single",
        "lsi",
        "pvscsi",
        "megasas",
        "lsi53c810",
        "l:1",
        "media=cdrom",
        "iothread=1",
        "cache=none",
        "cache=EVIL",
        "aio=native",
        "discard=on",
        "ssd=1",
        "ro=1",
        "serial=EVIL.",
        "wwn=0x5000c50015ea71aa",
        "virtio=BC:24:11:2E:C5:4A",
        "e1000",
        "vmxnet3",
        "bridge=/EVIL",
        "queues=4",
        "mtu=1400",
        "qxl",
        "std",
        "virtio",
        "socket",
        "order=scsi0;net0;ide2",
        "order=net0",
        "flags=+aes;-/EVIL",
        "efitype=4m",
        "pre-enrolled-keys=1",
        "version=v2.0",
        "uuid=9c2b2a2e-3c1e-4cf2-9b0a-0fb4ad10a9a3",
        "manufacturer=EVIL",
        "source=/dev/urandom",
        "model=ib700",
        "action=reset",
        "win11",
        "l26",
        "werror=stop",
        "rerror=EVIL",
        "detect_zeroes=1",
    ]
)
_LINES = st.tuples(_KEYS, st.lists(_PIECES, min_size=1, max_size=4).map(",".join))


def test_any_proxmox_configuration_becomes_a_valid_and_harmless_domain_or_is_refused(
    validates: Callable[[Sequence[str]], None],
) -> None:
    made: list[str] = []
    refusals: list[str] = []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(_LINES, max_size=14))
    def try_one(lines: list[tuple[str, str]]) -> None:
        text = "\n".join(f"{key}: {value}" for key, value in lines)
        try:
            xml = finished(draft_of_proxmox(text, ["drive-scsi0", "drive-ide2", "virtio0"])).xml
        except MachineConfigError as error:
            refusals.append(str(error))
            return
        assert [word for word in words_of(root_of(xml)) if "/EVIL" in word] == []
        made.append(xml)

    try_one()
    assert [text for text in refusals if not text.isprintable()] == []
    validates(made)
