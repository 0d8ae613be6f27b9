# SPDX-License-Identifier: Apache-2.0
"""Configurations as domains of libvirt's: what is kept, what is named, and that nothing of a host comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.access.machine.configs import UUID
from tests.access.machine.domains import FIRMWARE, OURS, RICH, finished, rich, root_of, words_of
from vmapipe.access.machine.domain import (
    HostFacts,
    Network,
    draft_of_libvirt,
    is_domain_name,
    parse_network,
)
from vmapipe.access.machine.domain_xml import Element, parse_xml, render_xml
from vmapipe.access.machine.spec import MachineConfigError

# --- From a domain's XML ---


def test_a_domain_keeps_its_machine_and_gets_this_hosts_places(
    validates: Callable[[Sequence[str]], None],
) -> None:
    draft = rich()
    xml = finished(draft).xml
    root = root_of(xml)
    assert (draft.name, draft.uuid) == ("web", UUID)
    assert draft.sources == {"vda": "drive-virtio-disk0", "sda": "drive-scsi0-0-0-0"}
    assert [root.find(tag).text for tag in ("name", "uuid", "memory", "vcpu")] == [
        "web2",
        OURS,
        "2097152",
        "4",
    ]
    assert root.find("title").text == "a <web> server"
    assert root.find("genid").tag
    assert not root.find("genid").text
    system = {e.get("name"): e.text for e in root.find("sysinfo/system").all("entry")}
    assert system == {"manufacturer": "We & Co", "uuid": OURS}
    assert root.find("os/loader").text == FIRMWARE.code
    assert root.find("os/nvram").text == "/ours/web2_VARS.fd"
    assert root.find("cpu/model").text == "Skylake-Client"
    assert root.find("features/hyperv/stimer/direct").tag
    devices = root.find("devices")
    disks = {disk.find("target").get("dev"): disk for disk in devices.all("disk")}
    assert disks["vda"].find("source").attributes == {"file": "/ours/vda.qcow2"}
    assert disks["vda"].find("driver").attributes == {
        "name": "qemu",
        "type": "qcow2",
        "cache": "none",
        "io": "native",
        "discard": "unmap",
        "iothread": "1",
    }
    assert disks["vda"].find("address").get("bus") == "0x03"
    assert disks["sda"].get("device") == "disk"
    assert not disks["sdb"].has("source")
    assert [card.find("model").get("type") for card in devices.all("interface")] == [
        "virtio",
        "e1000",
    ]
    validates([xml])


def test_nothing_of_the_host_that_a_domain_ran_on_comes_along() -> None:
    draft = rich()
    xml = finished(draft).xml
    paths = [word for word in words_of(root_of(xml)) if "/" in word]
    assert [path for path in paths if not path.startswith(("/ours/", "/dev/urandom"))] == []
    for word in ("evil", "br-host", "default", "secret", "0.0.0.0", "vnet3", "seclabel", "qemu:"):
        assert word not in xml, word


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("qemu:commandline", "it runs words of its own choice"),
        ("qemu:override", "command line"),
        ("hostdev", "a device of the host"),
        ("filesystem", "a folder of the host"),
        ("shmem", "memory that it shared"),
        ("os/kernel", "a file of the host"),
        ("memoryBacking", "memory of the host"),
        ("disk/encryption", "the restored disk is not encrypted"),
        ("disk/shareable", "this machine's alone"),
        ("interface/script", "it runs a program on the host"),
        ("interface/filterref", "a filter of the host"),
        ("metadata", "what other programs keep"),
        ("channel", "a way to a program"),
        ("sdb", "what is in the drive"),
        ("tpm", "its state is not in the archive"),
        ("on_crash", "not a value that is known: coredump-destroy"),
        ("input", "its type (passthrough)"),
    ],
)
def test_what_is_left_out_of_a_domain_is_named(key: str, reason: str) -> None:
    draft = rich()
    assert [o for o in draft.omissions if o.key == key and reason in o.reason]


def test_a_card_is_in_no_network_unless_somebody_says_which() -> None:
    draft = rich()
    alone = root_of(finished(draft).xml).find("devices")
    assert [(c.get("type"), c.find("link").get("state")) for c in alone.all("interface")] == [
        ("user", "down"),
        ("user", "down"),
    ]
    same = root_of(finished(draft, network=None).xml).find("devices")
    first, second = same.all("interface")
    assert first.find("source").attributes == {"network": "default"}
    assert first.find("driver").get("queues") == "4"
    # A bridge is the host's, whatever it is called.
    assert second.get("type") == "user"
    bridged = root_of(finished(draft, network=Network("bridge", "br0")).xml).find("devices")
    assert {c.find("source").get("bridge") for c in bridged.all("interface")} == {"br0"}


def test_a_machine_gets_what_this_host_has() -> None:
    host = HostFacts(
        "qemu", frozenset({"pc", "q35"}), frozenset(), frozenset({"vga"}), frozenset({"vnc"})
    )
    done = finished(rich(), host)
    root = root_of(done.xml)
    assert root.get("type") == "qemu"
    assert root.find("os/type").get("machine") == "q35"
    assert root.find("cpu").attributes == {"mode": "maximum"}
    assert root.find("cpu/topology").get("cores") == "4"
    assert not root.find("features").has("hyperv")
    assert not [t for t in root.find("clock").all("timer") if t.get("name") == "kvmclock"]
    assert root.find("devices/video/model").attributes == {"type": "vga"}
    assert [g.get("type") for g in root.find("devices").all("graphics")] == ["vnc"]
    assert "com.redhat.spice.0" not in done.xml
    assert {omission.key for omission in done.omissions} >= {"machine", "cpu", "video", "graphics"}


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        (RICH, "<domain><memory>1</memory></domain>", "no disk that is in the archive"),
        ("<memory unit='KiB'>2097152</memory>", "", "how much memory"),
        (">hvm<", ">xen<", "what kind of machine"),
        ("<domain ", "<!DOCTYPE x [<!ENTITY a 'b'>]><domain ", "document type"),
        ("<domain ", "<net ", "cannot be read"),
        ("</domain>", "<a>" * 60 + "</a>" * 60 + "</domain>", "nested too deeply"),
        ("</domain>", "<a/>" * 30_000 + "</domain>", "too many elements"),
        ("</domain>", "<!--" + "x" * (1 << 20) + "--></domain>", "more than 1024 KiB"),
        ("dev='sda' bus='scsi'", "dev='sda' bus='/x'", ""),
    ],
)
def test_a_domain_that_cannot_be_defined_is_refused_in_words(old: str, new: str, word: str) -> None:
    if not word:
        assert "sda" not in rich(old, new).sources
        return
    with pytest.raises(MachineConfigError) as refused:
        rich(old, new)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_billions_of_entities_are_refused_before_one_is_made() -> None:
    entities = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10 if n else 'lol'}'>" for n in range(12))
    with pytest.raises(MachineConfigError, match="document type"):
        draft_of_libvirt(f"<!DOCTYPE d [{entities}]><domain>&e11;</domain>".encode(), ["vda"])


@given(st.text(max_size=300))
@settings(deadline=None)
def test_what_is_rendered_is_read_as_it_was(text: str) -> None:
    kept = "".join(letter for letter in text if letter.isprintable()).strip()
    element = Element("a", {"b": kept})
    element.text = kept
    again = parse_xml(render_xml(element).encode())
    assert (again.text.strip(), again.get("b")) == (kept, kept)


@pytest.mark.parametrize(
    ("name", "is_good"),
    [("web", True), ("a.b-c_9+", True), ("", False), ("../x", False), ("a..b", False), ("-x", False), (".x", False), ("a b", True), (" a", False), ("a ", False), ("x" * 65, False), ("Büro 'ä' \"50%\" 🖥", True), ("🖥" * 51, False), ("a\nb", False), ("a\x1bb", False), ("a\u2028b", False), ("a\udc80b", False)],
)  # fmt: skip
def test_a_name_that_could_be_a_path_is_not_a_domains(name: str, is_good: bool) -> None:
    assert is_domain_name(name) is is_good


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("default", Network("network", "default")),
        ("bridge:br0", Network("bridge", "br0")),
        ("none", Network("none")),
        ("user", Network("user")),
        ("bridge:", None),
        ("bridge:" + "b" * 16, None),
        ("a/b", None),
        ("", None),
    ],
)
def test_a_network_is_a_plain_name(text: str, network: Network | None) -> None:
    assert parse_network(text) == network
