# SPDX-License-Identifier: Apache-2.0
"""A machine out of a configuration, with the limits of a test."""

from __future__ import annotations

from collections.abc import Sequence

from vmapipe.access.machine.argv import Wiring
from vmapipe.access.machine.libvirt import looks_like_libvirt, machine_of_libvirt
from vmapipe.access.machine.proxmox import machine_of_proxmox
from vmapipe.access.machine.spec import Limits, MachineSpec

LIMITS = Limits(1 << 30, 2)
WIRING = Wiring("pc", "tcg", "nbd", "ser", "fw", "ga")
UUID = "9c2b2a2e-3c1e-4cf2-9b0a-0fb4ad10a9a3"


def machine(text: str, devices: Sequence[str], limits: Limits = LIMITS) -> MachineSpec:
    if looks_like_libvirt(text.encode()):
        return machine_of_libvirt(text.encode(), devices, limits)
    return machine_of_proxmox(text, devices, limits)


LINUX = f"""\
#comment: x
boot: order=scsi0;net0
cores: 2
memory: 512
ostype: l26
scsihw: virtio-scsi-single
scsi0: local:100/vm-100-disk-0.raw,iothread=1,serial=ABC-1,size=2G,ssd=1
net0: virtio=BC:24:11:2E:C5:4A,bridge=vmbr0,firewall=1
ipconfig0: ip=192.168.7.20/24,gw=192.168.7.1
agent: 1,fstrim_cloned_disks=1
smbios1: uuid={UUID}
#qmdump#map:scsi0:drive-scsi0:local:raw:
[snapshot]
cores: 9
args: -evil
"""
WINDOWS = """\
bios: ovmf
boot: order=sata0
cores: 4
sockets: 2
cpu: x86-64-v2-AES
efidisk0: l:1,efitype=4m,pre-enrolled-keys=1,size=4M
machine: pc-q35-99.1+pve0
memory: current=4096
ostype: win11
sata0: l:2,size=2G
ide2: none,media=cdrom
net0: e1000=BC:24:11:2E:C5:4B,bridge=vmbr0
tpmstate0: l:3,size=4M,version=v2.0
hostpci0: 01:00
hookscript: local:snippets/x.pl
args: -device evil
vga: qxl
"""
OLD = """\
bootdisk: ide1
cores: 1
ide0: l:2,size=2G
ide1: l:4
machine: pc-i440fx-7.1+pve0
memory: 512
net0: rtl8139=BC:24:11:2E:C5:4C,bridge=vmbr0
ostype: w2k8
acpi: 0
kvm: 0
"""
MANY = """\
scsi0: l:2
scsi1: l:3,backup=0
scsi15: l:7
memory: 512
machine: q35
virtio1: l:5
virtio7: l:6
ide0: x
ide1: x
ide2: x
sata3: f
net7: vmxnet3=BC:24:11:2E:C5:4C
"""
DOMAIN = f"""\
<domain type='kvm' id='3'>
  <name>web</name><uuid>{UUID}</uuid>
  <memory unit='KiB'>2097152</memory><vcpu placement='static' current='1'>4</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <boot dev='hd'/></os>
  <features><acpi/></features><cpu mode='host-passthrough'/><clock offset='localtime'/>
  <devices><emulator>/usr/bin/evil</emulator>
  <disk type='file' device='disk'><source file='/x/web.qcow2'/><target dev='vda' bus='virtio'/>
    <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></disk>
  <disk type='file' device='disk'><target dev='sdb' bus='scsi'/><boot order='1'/>
    <address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>
  <disk type='file' device='disk'><target dev='sdc' bus='sata'/>
    <address type='drive' controller='0' bus='0' target='0' unit='2'/></disk>
  <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
  <controller type='scsi' index='0' model='virtio-scsi'/>
  <controller type='pci' index='0' model='pcie-root'/>
  <controller type='pci' index='1' model='pcie-root-port'><target chassis='1' port='0x10'/>
    <address type='pci' bus='0x00' slot='0x02' function='0x0' multifunction='on'/></controller>
  <controller type='pci' index='2' model='pcie-to-pci-bridge'>
    <address type='pci' bus='0x01' slot='0x00' function='0x0'/></controller>
  <controller type='pci' index='3' model='pcie-root-port'><target chassis='3' port='0x11'/>
    <address type='pci' bus='0x00' slot='0x02' function='0x1'/></controller>
  <interface type='network'><mac address='52:54:00:12:34:56'/><model type='virtio'/>
    <address type='pci' bus='0x02' slot='0x01' function='0x0'/></interface>
  <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  <video><model type='qxl'/><address type='pci' bus='0x00' slot='0x01' function='0x0'/></video>
  <hostdev mode='subsystem'/>
  </devices>
  <qemu:commandline xmlns:qemu='urn:x'><qemu:arg value='-evil'/></qemu:commandline>
</domain>
"""
PLAIN_DOMAIN = """\
<domain><memory unit='GiB'>1</memory><vcpu>1</vcpu><os><type machine='pc'>hvm</type></os><devices>
<disk device='disk'><target dev='vda' bus='virtio'/>
  <address type='pci' domain='0' bus='0' slot='7' function='0'/></disk>
<disk device='disk'><target dev='hda' bus='ide'/></disk>
<disk device='disk'><target dev='sda' bus='usb'/></disk>
<disk device='disk'><target dev='sdb' bus='scsi'/></disk>
<interface type='bridge'><model type='e1000'/>
  <address type='pci' bus='0x00' slot='0x03' function='0x0'/></interface>
</devices></domain>
"""
