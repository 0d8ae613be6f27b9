# SPDX-License-Identifier: Apache-2.0
"""A running machine of Proxmox VE, backed up over its only monitor."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.control.hosts.pve.simulated import SimulatedNode, blockdev, pvestatd, scsi
from tests.control.qemu.paused_machine import PausedMachine
from tests.control.qemu.software_tpm import swtpm
from tests.machine import Need, end_of, eventually, good, next_event, started, without_limit

MIB = 1 << 20
CONF = """\
#the web server
bios: ovmf
boot: order=scsi0
cores: 1
efidisk0: local:100/vm-100-disk-1.raw,efitype=4m,size=528K
ide2: none,media=cdrom
ide0: local:100/vm-100-cloudinit.qcow2,media=cdrom
machine: q35
memory: 64
name: web
scsi0: local:100/vm-100-disk-0.raw,iothread=1,size=8M
scsi1: local:100/vm-100-disk-2.qcow2,backup=0,size=8M
scsi2: local:100/vm-100-disk-3.raw,ro=1,size=4M
scsihw: virtio-scsi-single
tpmstate0: local:100/vm-100-disk-4.raw,size=4M,version=v2.0
unused0: local:100/vm-100-disk-9.raw

[before-upgrade]
memory: 32
scsi0: local:100/vm-100-disk-0.raw
"""
EFI_BYTES = 540672
FIREWALL = b"[OPTIONS]\nenable: 1\n"
OVMF = "/usr/share/OVMF/OVMF_CODE_4M.fd"


class Web(NamedTuple):
    """VM 100: its node, its QEMU, and what its disks hold at first."""

    node: SimulatedNode
    machine: PausedMachine
    contents: dict[str, bytes]


@contextmanager
def web(node: SimulatedNode, need: Need, tmp_path: Path) -> Iterator[Web]:
    (img,) = need("qemu-img")
    chance = random.Random(5)
    contents = {
        "drive-efidisk0": chance.randbytes(EFI_BYTES),
        "drive-scsi0": chance.randbytes(8 * MIB),
        "drive-scsi2": chance.randbytes(4 * MIB),
    }
    node.configure(100, CONF)
    (node.pve / "firewall/100.fw").write_bytes(FIREWALL)
    efi = node.image(100, "vm-100-disk-1.raw", contents["drive-efidisk0"])
    first = node.image(100, "vm-100-disk-0.raw", contents["drive-scsi0"])
    second = node.image(100, "vm-100-disk-2.qcow2", b"")
    subprocess.run([img, "create", "-q", "-f", "qcow2", second, "8M"], check=True)
    third = node.image(100, "vm-100-disk-3.raw", contents["drive-scsi2"])
    tpm = node.image(100, "vm-100-disk-4.raw", bytes(4 * MIB))
    folder = tmp_path / "m"
    folder.mkdir()
    control = folder / "control"
    code = {"driver": "file", "filename": OVMF}
    words = [
        *(
            "-blockdev",
            f"driver=raw,node-name=pflash0,read-only=on,file.driver=file,file.filename={code['filename']}",
        ),
        *blockdev("efidisk0", efi, size=EFI_BYTES),
        *scsi(0, first),
        *scsi(1, second, "qcow2"),
        *scsi(2, third, is_read_only=True),
        *("-chardev", f"socket,id=tpmchar,path={control}"),
        *("-tpmdev", "emulator,id=tpmdev,chardev=tpmchar", "-device", "tpm-tis,tpmdev=tpmdev"),
        *(
            "-chardev",
            f"socket,path={node.root}/var/run/qemu-server/100.qga,server=on,wait=off,id=qga0",
        ),
        *(
            "-device",
            "virtio-serial,id=qga0",
            "-device",
            "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        ),
    ]
    with ExitStack() as stack:
        stack.enter_context(swtpm(need, folder, f"backend-uri=file://{tpm},mode=0600"))
        machine = stack.enter_context(
            node.running(
                need, folder, 100, words, machine="q35,pflash0=pflash0,pflash1=drive-efidisk0"
            )
        )
        yield Web(node, machine, contents)


def test_all_disks_that_vzdump_takes_are_in_the_archive_and_pvestatd_is_answered_all_the_time(
    qemu: str, node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with web(node, need, tmp_path) as vm, pvestatd(node.qmp(100)) as asking:
        words = node.words("--pve", "100", "--json", "--speed", "1M", "--guest-latency", "10s")
        with started(*words, node.dump) as process:
            next_event(process, "instant")
            assert next_event(process, "guest-latency")["limit_bytes_s"] == MIB
            assert "lock: backup\n" in node.config(100)
            # The guest stands still: its TPM is asked nothing.
            tpm = node.root / "var/lib/vz/images/100/vm-100-disk-4.raw"
            vm.contents["drive-tpmstate0-backup"] = tpm.read_bytes().ljust(4 * MIB, b"\0")
            before = len(asking.took_s)
            vm.machine.write("scsi0", "write -P 7 0 4M")
            assert eventually(lambda: len(asking.took_s) > before + 5)
            without_limit(process)
            code, said = end_of(process)
        assert code == 0, said
        assert node.config(100) == CONF
        assert vm.machine.is_untouched()
        assert "histogram" not in str(vm.machine.ask("query-blockstats"))
    print(f"{len(asking.took_s)} rounds of pvestatd, the slowest took {max(asking.took_s):.2f} s")
    assert float("inf") not in asking.took_s
    (archive,) = node.dump.glob("*.vma")
    good("restore", archive, tmp_path / "out")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("disk-*")}
    assert contents == {f"disk-{name}.raw": content for name, content in vm.contents.items()}
    assert (tmp_path / "out/qemu-server.fw").read_bytes() == FIREWALL
    stored = (tmp_path / "out/qemu-server.conf").read_text().splitlines()
    assert "#scsi1: local:100/vm-100-disk-2.qcow2,backup=0,size=8M" in stored
    assert "scsi2: local:100/vm-100-disk-3.raw,ro=1,size=4M" in stored
    assert "ide0: local:100/vm-100-cloudinit.qcow2,media=cdrom" in stored
    assert [line for line in stored if line.startswith(("[", "unused", "lock"))] == []
    assert sorted(line for line in stored if line.startswith("#qmdump")) == [
        "#qmdump#map:efidisk0:drive-efidisk0:local:raw:",
        "#qmdump#map:scsi0:drive-scsi0:local:raw:",
        "#qmdump#map:scsi2:drive-scsi2:local:raw:",
        "#qmdump#map:tpmstate0:drive-tpmstate0-backup:local:raw:",
    ]
