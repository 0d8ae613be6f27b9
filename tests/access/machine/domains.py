# SPDX-License-Identifier: Apache-2.0
"""A domain with one of everything, and what vmapipe makes of a configuration."""

from __future__ import annotations

from pathlib import Path

from tests.access.machine.configs import UUID
from vmapipe.access.machine.domain import (
    DomainText,
    Draft,
    HostFacts,
    Identity,
    Network,
    Placement,
    domain_xml,
    draft_of_libvirt,
)
from vmapipe.access.machine.domain_xml import Element, parse_xml
from vmapipe.access.machine.firmware import Firmware

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
