# SPDX-License-Identifier: Apache-2.0
"""Configurations as domains of libvirt's: what is kept, what is named, and that nothing of a host comes in."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.access.machine.test_machine_config import LINUX, MANY, OLD, UUID, WINDOWS
from tests.conftest import absent
from tests.machine import LIMIT_S, Need
from vmapipe.access.machine.domain import (
    DomainText,
    Draft,
    HostFacts,
    Identity,
    Network,
    Placement,
    domain_xml,
    draft_of_libvirt,
    is_domain_name,
    parse_network,
)
from vmapipe.access.machine.domain_xml import Element, parse_xml, render_xml
from vmapipe.access.machine.firmware import Firmware
from vmapipe.access.machine.proxmox_domain import draft_of_proxmox
from vmapipe.access.machine.spec import MachineConfigError

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
HOST = HostFacts("kvm", networks=frozenset({"default"}))
NO_NETWORK = Network()
FIRMWARE = Firmware("/ours/CODE.fd", "/ours/VARS.fd", 540672, True, "")
OURS = "5f0c7a52-0c0a-4c6e-8f7e-3f3e6a1f7b11"
# One of each thing that a domain may have, and of each that it may not bring along.
RICH = f"""\
<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>{UUID}</uuid><genid>{UUID}</genid><title>a &lt;web&gt; server</title>
  <description>two
lines</description>
  <metadata><x:y xmlns:x='urn:x'>z</x:y></metadata>
  <maxMemory slots='16' unit='KiB'>8388608</maxMemory>
  <memory unit='KiB'>2097152</memory><currentMemory unit='KiB'>1048576</currentMemory>
  <memoryBacking><hugepages/><source type='file'/></memoryBacking>
  <vcpu placement='static' cpuset='0-1' current='1'>4</vcpu><iothreads>2</iothreads>
  <cputune><vcpupin vcpu='0' cpuset='1'/></cputune><numatune><memory nodeset='0'/></numatune>
  <resource><partition>/machine</partition></resource>
  <sysinfo type='smbios'><system><entry name='manufacturer'>We &amp; Co</entry>
    <entry name='uuid'>{UUID}</entry></system><oemStrings><entry>a/b</entry></oemStrings></sysinfo>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' secure='yes' type='pflash'>/host/CODE.fd</loader>
    <nvram template='/host/VARS.fd'>/host/web_VARS.fd</nvram>
    <kernel>/host/vmlinuz</kernel><initrd>/host/initrd</initrd><cmdline>quiet</cmdline>
    <bootmenu enable='yes' timeout='3000'/><smbios mode='sysinfo'/>
    <acpi><table type='slic'>/host/slic</table></acpi></os>
  <features><acpi/><apic/><smm state='on'><tseg unit='MiB'>48</tseg></smm>
    <hyperv mode='custom'><relaxed state='on'/><spinlocks state='on' retries='8191'/>
      <stimer state='on'><direct state='on'/></stimer><vendor_id state='on' value='abc'/></hyperv>
    <kvm><hidden state='on'/></kvm><vmport state='off'/><ioapic driver='kvm'/></features>
  <cpu mode='custom' match='exact' check='partial'><model fallback='allow'>Skylake-Client</model>
    <topology sockets='1' dies='1' cores='4' threads='1'/><feature policy='require' name='vmx'/>
    <numa><cell id='0' cpus='0-3' memory='2097152' unit='KiB'/></numa></cpu>
  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/><timer name='kvmclock' present='yes'/>
    <timer name='hpet' present='no'/></clock>
  <on_poweroff>destroy</on_poweroff><on_crash>coredump-destroy</on_crash>
  <pm><suspend-to-mem enabled='no'/></pm>
  <devices><emulator>/host/qemu</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native'
        discard='unmap' iothread='1'/><source file='/host/web.qcow2'><seclabel model='dac'/></source>
      <backingStore type='file'><source file='/host/base.qcow2'/></backingStore>
      <target dev='vda' bus='virtio'/><iotune><total_iops_sec>100</total_iops_sec></iotune>
      <serial>S-1</serial><encryption format='luks'/><boot order='1'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></disk>
    <disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/host'/>
      <target dev='sda' bus='scsi'/><shareable/><wwn>5000c50015ea71aa</wwn>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>
    <disk type='file' device='cdrom'><source file='/host/x.iso'/><target dev='sdb' bus='sata'/>
      <readonly/></disk>
    <controller type='scsi' index='0' model='virtio-scsi'><driver queues='4'/></controller>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'><model name='pcie-root-port'/>
      <target chassis='1' port='0x10'/>
      <address type='pci' domain='0' bus='0' slot='2' function='0' multifunction='on'/></controller>
    <controller type='pci' index='2' model='pcie-root-port'><target chassis='2' port='0x11'/>
      <address type='pci' domain='0' bus='0' slot='2' function='1'/></controller>
    <controller type='pci' index='3' model='pcie-root-port'><target chassis='3' port='0x12'/>
      <address type='pci' domain='0' bus='0' slot='2' function='2'/></controller>
    <controller type='usb' index='0' model='qemu-xhci' ports='15'/>
    <interface type='network'><mac address='52:54:00:12:34:56'/>
      <source network='default' portid='{UUID}' bridge='virbr0'/><target dev='vnet3'/>
      <model type='virtio'/><driver name='vhost' queues='4'/><mtu size='1400'/>
      <filterref filter='clean-traffic'/><bandwidth><inbound average='1'/></bandwidth>
      <address type='pci' domain='0' bus='1' slot='0' function='0'/></interface>
    <interface type='bridge'><mac address='52:54:00:12:34:57'/><source bridge='br-host'/>
      <script path='/host/up'/><model type='e1000'/></interface>
    <serial type='file'><source path='/host/log'/><target type='isa-serial' port='0'>
      <model name='isa-serial'/></target></serial>
    <console type='pty' tty='/dev/pts/3'><target type='serial' port='0'/></console>
    <channel type='unix'><source mode='bind' path='/host/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <channel type='unix'><source mode='connect' path='/host/x'/>
      <target type='virtio' name='org.example'/></channel>
    <input type='tablet' bus='usb'/><input type='passthrough'><source evdev='/dev/input'/></input>
    <graphics type='spice' port='5900' listen='0.0.0.0' passwd='secret'><listen type='address'
      address='0.0.0.0'/></graphics>
    <graphics type='sdl' display=':0' xauth='/host/.Xauthority'/>
    <sound model='ich9'/><audio id='1' type='none'/>
    <video><model type='qxl' ram='65536' vram='65536' vgamem='16384' heads='1' primary='yes'>
      <acceleration accel3d='yes' rendernode='/dev/dri'/></model></video>
    <hostdev mode='subsystem' type='pci'/><redirdev bus='usb' type='spicevmc'/>
    <filesystem type='mount'><source dir='/host'/><target dir='x'/></filesystem>
    <shmem name='x'/><vsock/><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <memballoon model='virtio'><stats period='5'/></memballoon>
    <rng model='virtio'><rate bytes='1024'/><backend model='random'>/dev/hwrng</backend></rng>
    <watchdog model='i6300esb' action='dump'/><panic model='isa'/>
  </devices>
  <seclabel type='static' model='dac'><label>root:root</label></seclabel>
  <qemu:commandline><qemu:arg value='-evil'/></qemu:commandline>
  <qemu:override/>
</domain>
"""
RICH_DEVICES = ("drive-virtio-disk0", "drive-scsi0-0-0-0", "drive-efidisk0")


def finished(
    draft: Draft, host: HostFacts = HOST, network: Network | None = NO_NETWORK, name: str = "web2"
) -> DomainText:
    placements = {
        disk.key: Placement("file", f"/ours/{disk.key}.qcow2", "qcow2")
        for disk in draft.disks
        if disk.source
    }
    macs = [f"52:54:00:00:00:{index:02x}" for index in range(len(draft.cards))]
    firmware = FIRMWARE if draft.firmware.kind == "uefi" else None
    variables = "/ours/web2_VARS.fd" if draft.firmware.variables else ""
    identity = Identity(name, OURS, macs)
    return domain_xml(draft, identity, placements, host, network, firmware, variables)


def rich(old: str = "", new: str = "") -> Draft:
    assert old in RICH
    return draft_of_libvirt(RICH.replace(old, new).encode(), RICH_DEVICES)


def root_of(xml: str) -> Element:
    return parse_xml(xml.encode())


def reasons(draft: Draft) -> dict[str, str]:
    return {omission.key: omission.reason for omission in draft.omissions}


def words_of(element: Element) -> list[str]:
    """Each value in an element, but for what people or the guest's maker wrote."""
    found = list(element.attributes.values())
    if element.tag not in ("title", "description", "entry"):
        found.append(element.text.strip())
    for child in element.children:
        found += words_of(child)
    return found


@pytest.fixture(scope="session")
def validates(
    need: Need, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str]], None]:
    """Whether libvirt's own schema takes all of these."""
    (xmllint,) = need("xmllint")
    if not SCHEMA.exists():
        absent("libvirt's schemas (Debian: libvirt0)")

    def check(texts: Sequence[str]) -> None:
        if not texts:
            return
        folder = tmp_path_factory.mktemp("xml")
        paths = [folder / f"{index}.xml" for index in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        words = [xmllint, "--noout", "--relaxng", str(SCHEMA), *map(str, paths)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-3000:]

    return check


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


# --- From Proxmox VE ---

PROXMOX = [
    (LINUX, ["drive-scsi0"]),
    (WINDOWS, ["drive-sata0", "drive-efidisk0", "drive-tpmstate0-backup"]),
    (OLD, ["drive-ide0", "drive-ide1"]),
    (
        MANY,
        [
            f"drive-{k}"
            for k in [
                "scsi0",
                "scsi1",
                "scsi15",
                "virtio1",
                "virtio7",
                "ide0",
                "ide1",
                "ide2",
                "sata3",
            ]
        ],
    ),
]


def test_machines_of_proxmox_become_valid_domains(
    validates: Callable[[Sequence[str]], None],
) -> None:
    drafts = [draft_of_proxmox(text, names) for text, names in PROXMOX]
    validates([finished(draft).xml for draft in drafts])
    for draft, (_, names) in zip(drafts, PROXMOX, strict=True):
        disks = [n for n in names if "efidisk" not in n and "tpmstate" not in n]
        assert sorted(draft.sources.values()) == sorted(disks)


def test_a_linux_of_proxmox_finds_its_network_card_where_it_was() -> None:
    draft = draft_of_proxmox(LINUX, ["drive-scsi0"])
    root = root_of(finished(draft).xml)
    address = root.find("devices/interface/address")
    # Slot 18 of the first bus: ens18.
    assert (address.get("bus"), address.get("slot")) == ("0x00", "0x12")
    disk = root.find("devices/disk")
    assert disk.find("target").attributes == {"dev": "sda", "bus": "scsi", "rotation_rate": "1"}
    assert disk.find("serial").text == "ABC-1"
    assert [e.find("boot").get("order") for e in (disk, root.find("devices/interface"))] == [
        "1",
        "2",
    ]
    scsi = next(c for c in root.find("devices").all("controller") if c.get("type") == "scsi")
    assert scsi.find("driver").get("iothread") == "1"
    assert root.find("iothreads").text == "1"
    assert root.find("devices/channel/target").get("name") == "org.qemu.guest_agent.0"


def test_a_q35_of_proxmox_keeps_the_buses_that_name_its_cards() -> None:
    """`enp6s18`: five buses before the first bridge, and none that libvirt would add in front."""
    root = root_of(finished(draft_of_proxmox(MANY, ["drive-scsi0"])).xml)
    devices = root.find("devices")
    bridges = [c for c in devices.all("controller") if c.get("type") == "pci"]
    models = [c.get("model") for c in bridges]
    assert models[:7] == ["pcie-root", *["pcie-root-port"] * 4, "dmi-to-pci-bridge", "pci-bridge"]
    placed = [
        e for e in devices.children if e.tag not in ("input", "graphics", "controller", "disk")
    ]
    assert [e.tag for e in placed if not e.has("address")] == []
    usb = {c.get("model") for c in devices.all("controller") if c.get("type") == "usb"}
    assert usb == {"ich9-uhci1", "ich9-uhci2", "ich9-uhci3", "ich9-ehci1"}


def test_a_windows_of_proxmox_has_its_firmware_tpm_and_clock() -> None:
    draft = draft_of_proxmox(WINDOWS, ["drive-sata0", "drive-efidisk0", "drive-tpmstate0-backup"])
    root = root_of(finished(draft).xml)
    assert draft.firmware.variables == "drive-efidisk0"
    assert root.find("os/loader").get("secure") == "yes"
    assert root.find("features/smm").get("state") == "on"
    assert root.find("clock").get("offset") == "localtime"
    assert root.find("devices/tpm/backend").attributes == {"type": "emulator", "version": "2.0"}
    assert root.find("cpu/topology").attributes["sockets"] == "2"
    assert root.find("features/hyperv/relaxed").get("state") == "on"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("args: -device evil", "args"),
        ("hookscript: local:snippets/x.pl", "hookscript"),
        ("hostpci0: 0000:01:00.0,pcie=1", "hostpci0"),
        ("usb0: host=1234:5678", "usb0"),
        ("virtiofs0: dirid=x", "virtiofs0"),
        ("onboot: 1", "onboot"),
        ("startup: order=1", "startup"),
        ("cpulimit: 2", "cpulimit"),
        ("balloon: 256", "balloon"),
        ("audio0: device=AC97", "audio0"),
        ("vga: virtio-gl", "vga"),
        ("cpu: custom-x", "cpu"),
        ("unused0: local:x", "unused0"),
        ("serial1: /dev/ttyS0", "serial1"),
        ("rng0: source=/dev/hwrng", "rng0"),
        ("watchdog: model=i6300esb,action=debug", "watchdog"),
        ("net0: virtio=BC:24:11:2E:C5:4A,bridge=vmbr0,tag=7", "net0"),
        ("scsi0: local:x,mbps_rd=10", "scsi0"),
        ("ide2: local:iso/x.iso,media=cdrom", "ide2"),
        ("protection: 1", "protection"),
        ("nonsense: 1", "nonsense"),
    ],
)
def test_a_key_of_proxmox_without_a_counterpart_is_named(line: str, key: str) -> None:
    text = f"scsi0: local:x\nmemory: 512\nnet0: virtio=BC:24:11:2E:C5:4A\n{line}\n"
    draft = draft_of_proxmox(text, ["drive-scsi0"])
    assert key in reasons(draft)
    xml = finished(draft).xml
    assert "evil" not in xml
    assert "hwrng" not in xml


def test_a_cloud_init_drive_that_is_in_the_archive_keeps_its_content() -> None:
    text = "memory: 512\nscsi0: l:1\nide2: l:vm-1-cloudinit,media=cdrom\nboot: order=ide2;scsi0\n"
    draft = draft_of_proxmox(text, ["drive-scsi0", "drive-ide2"])
    assert draft.sources == {"sda": "drive-scsi0", "hda": "drive-ide2"}
    cdrom = draft.disks[1].element
    assert (cdrom.get("device"), cdrom.find("boot").get("order")) == ("cdrom", "1")
    assert draft.disks[0].element.find("boot").get("order") == "2"


# --- Any configuration ---

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
