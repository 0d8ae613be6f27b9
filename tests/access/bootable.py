# SPDX-License-Identifier: Apache-2.0
"""A disk that boots by BIOS and by UEFI into a small Linux with a login prompt, an agent and a server.

A FAT partition has syslinux, systemd-boot, Debian's kernel and an initramfs; the "system" is an ext4
partition that has to be mounted. What a test breaks in it fails as it does in a real machine.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import absent
from tests.control.qemu.agent import find_agent, libraries
from tests.guest import PORT_MODULES, Kernel, make_initramfs
from tests.machine import Need

SYSLINUX = Path("/usr/lib/syslinux/mbr/mbr.bin")
SYSTEMD_BOOT = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
OVMF = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
MIB = 1 << 20
# The kernel has 14 MiB, the initramfs some 12 with the agent and its libraries.
_BOOT_MIB, _SYSTEM_MIB = 48, 8
_START_SECTOR = 2048
_SYSTEM_SECTOR = _START_SECTOR + _BOOT_MIB * 2048
SYSTEM_OFFSET = _SYSTEM_SECTOR * 512
_NET_MODULES = ("../net/core/failover", "net/net_failover", "net/virtio_net")
# As little as possible on an emulated processor; the screen and the serial port both are consoles.
_COMMAND_LINE = "console=tty0 console=ttyS0 quiet mitigations=off tsc=reliable no_timer_check nokaslr rdinit=/start"
# It begins like a distribution's; a root that cannot be mounted ends it, and so the kernel.
_START = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk \
    virtio_console failover net_failover virtio_net; do
    insmod /modules/$module.ko
done
case "$(cat /proc/cmdline)" in *hang*) echo "Waiting for a device"; while true; do sleep 1000; done;; esac
until [ -b /dev/vda2 ]; do true; done
mount -t ext4 /dev/vda2 /mnt || exit 1
(until [ -c /dev/vport?p1 ]; do sleep 0.1; done
 while true; do qemu-ga -m virtio-serial -p /dev/vport?p1 -t /tmp -f /tmp/ga.pid || sleep 1; done) >/tmp/words 2>&1 &
ip link set lo up
ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0
mkdir /tmp/www && echo hello from the guest >/tmp/www/index.html && httpd -p 80 -h /tmp/www
for console in tty0 ttyS0; do printf '\\nTest GNU/Linux restored\\n\\nrestored login: ' >/dev/$console; done
n=0
while true; do n=$((n + 1)); echo $n >/mnt/counter; sync; sleep 1; [ ! -e /mnt/rounds ] || echo round $n >/dev/ttyS0; done
"""


def _run(*words: str | Path, **more: object) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr.decode()


def make_bootable(
    need: Need, kernel: Kernel, folder: Path, disk: Path, *extra: str, script: str = ""
) -> None:
    """`extra` goes to the kernel's command line; with rdinit=/init it runs `script`, as a `Guest` does.

    Skips where a program is missing.
    """
    sfdisk, mkfs, mcopy, mmd, syslinux, mke2fs, busybox = need(
        "sfdisk", "mkfs.fat", "mcopy", "mmd", "syslinux", "mke2fs", "busybox"
    )
    for program in (SYSLINUX, SYSTEMD_BOOT):
        if not program.exists():
            absent(str(program))
    agent = find_agent()
    if agent is None:
        absent("qemu-ga")
    folder.mkdir()
    line = " ".join((_COMMAND_LINE, *extra))
    start = folder / "start"
    start.write_text(_START)
    files = {"bin/qemu-ga": agent, **libraries(agent), "start": start}
    initrd = make_initramfs(kernel, Path(busybox), script, (*PORT_MODULES, *_NET_MODULES), files)
    (folder / "initrd").write_bytes(initrd)
    (folder / "syslinux.cfg").write_text(
        f"DEFAULT l\nLABEL l\n LINUX /vmlinuz\n INITRD /initrd\n APPEND {line}\n"
    )
    (folder / "loader.conf").write_text("timeout 0\ndefault l.conf\n")
    (folder / "l.conf").write_text(f"title Linux\nlinux /vmlinuz\ninitrd /initrd\noptions {line}\n")
    boot = folder / "boot.fat"
    with boot.open("wb") as file:
        file.truncate(_BOOT_MIB * MIB)
    _run(mkfs, "-F", "16", boot)
    _run(mmd, "-i", boot, "::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries")
    _run(mcopy, "-i", boot, kernel.image, "::/vmlinuz")
    _run(mcopy, "-i", boot, folder / "initrd", folder / "syslinux.cfg", "::/")
    _run(mcopy, "-i", boot, SYSTEMD_BOOT, "::/EFI/BOOT/BOOTX64.EFI")
    _run(mcopy, "-i", boot, folder / "loader.conf", "::/loader/")
    _run(mcopy, "-i", boot, folder / "l.conf", "::/loader/entries/")
    _run(syslinux, "--install", boot)
    with disk.open("wb") as file:
        file.truncate((_START_SECTOR * 512) + (_BOOT_MIB + _SYSTEM_MIB) * MIB)
    layout = (
        f"label: dos\n{_START_SECTOR},{_BOOT_MIB * 2048},c,*\n"
        f"{_SYSTEM_SECTOR},{_SYSTEM_MIB * 2048},83\n"
    )
    _run(sfdisk, "-q", disk, input=layout.encode())
    with disk.open("r+b") as file:
        file.write(SYSLINUX.read_bytes()[:440])
        file.seek(_START_SECTOR * 512)
        file.write(boot.read_bytes())
    options = f"offset={SYSTEM_OFFSET}"
    _run(mke2fs, "-q", "-t", "ext4", "-E", options, disk, f"{_SYSTEM_MIB}M")


def zero_kernel(need: Need, disk: Path) -> None:
    """The file has its size, and nothing else."""
    (mcopy,) = need("mcopy")
    image = f"{disk}@@{_START_SECTOR * 512}"
    zeroes = disk.with_suffix(".zeroes")
    with zeroes.open("wb") as file:
        file.truncate(14 * MIB)
    _run(mcopy, "-o", "-i", image, zeroes, "::/vmlinuz")
    zeroes.unlink()


def break_system(disk: Path) -> None:
    """Its superblock and the group descriptors are gone."""
    with disk.open("r+b") as file:
        file.seek(SYSTEM_OFFSET)
        file.write(bytes(MIB))


def config(*lines: str) -> str:
    return "\n".join(
        (
            *("boot: order=virtio0", "cores: 1", "memory: 256", "ostype: l26"),
            "net0: virtio=BC:24:11:2E:C5:4A,bridge=vmbr0",
            "virtio0: local:100/vm-100-disk-0.raw,size=64M",
            *lines,
            "",
        )
    )
