# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's whose disk a monitor serves, as the manual says it: a killed guard costs no error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.machine import LIMIT_S, Need, eventually, good, listens, started

pytestmark = pytest.mark.soak  # few machines have libvirt
MANUAL = Path(__file__).parents[3] / "docs" / "operations" / "backup.md"
DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vmapipe-test</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><emulator>{qemu}</emulator><memballoon model='none'/></devices>
  {command_line}
</domain>
"""


# What libvirt needs to know where nothing of it is installed as a service, and we are root.
SETTINGS = """\
stdio_handler = "file"
user = "root"
group = "root"
security_driver = "none"
remember_owner = 0
"""


class Virsh:
    """A libvirt that is in this one process, and has nothing but its own folder."""

    def __init__(self, program: str, folder: Path) -> None:
        (folder / "etc").mkdir(parents=True)
        (folder / "etc" / "qemu.conf").write_text(SETTINGS)
        self._process = subprocess.Popen(
            [program, "-q", "-c", f"qemu:///embed?root={folder}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, line: str) -> None:
        """As somebody types it; one after the other."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self("destroy vmapipe-test")
        self("quit")
        self._process.communicate(timeout=LIMIT_S)


@pytest.fixture
def virsh(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Virsh]:
    (program,) = need("virsh")
    if os.geteuid() != 0:
        pytest.skip("an embedded libvirt without a user's session is root's")
    # A short path: sockets of libvirt's lie four folders deeper.
    virsh = Virsh(program, tmp_path_factory.mktemp("v") / "v")
    yield virsh
    virsh.close()


def test_a_guest_of_libvirt_does_not_notice_that_the_guard_of_its_disk_is_killed(
    need: Need, virsh: Virsh, tmp_path: Path
) -> None:
    (qemu,) = need("qemu-system-x86_64")
    disk, export, monitor = (tmp_path / name for name in ("a.raw", "a.sock", "m.sock"))
    disk.write_bytes(bytes(1 << 20))
    (manual,) = re.findall(r"<qemu:commandline>.*?</qemu:commandline>", MANUAL.read_text(), re.S)
    domain = tmp_path / "domain.xml"
    line = manual.replace("/run/vm/scsi0.sock", str(export))
    domain.write_text(DOMAIN.format(qemu=qemu, command_line=line))
    words = ("--disk", f"drive-scsi0={disk}", "--export", f"drive-scsi0={export}")
    with started("monitor", "--listen", monitor, *words) as serving:
        assert eventually(lambda: listens(export))
        virsh(f"define {domain}")
        virsh("start vmapipe-test")

        def write(pattern: int) -> None:
            device = "/machine/peripheral/virtio0/virtio-backend"
            line = f'qemu-io -d {device} "write -P {pattern} 0 64k"'
            virsh(f"qemu-monitor-command --hmp vmapipe-test '{line}'")

        write(1)
        assert eventually(lambda: disk.read_bytes()[:65536] == b"\1" * 65536)
        (guard,) = psutil.Process(serving.pid).children()
        guard.send_signal(signal.SIGKILL)
        write(2)
        assert eventually(lambda: disk.read_bytes()[:65536] == b"\2" * 65536)
        good("backup", "--monitor", monitor, tmp_path / "vm.vma")
