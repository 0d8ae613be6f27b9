# SPDX-License-Identifier: Apache-2.0
"""A libvirtd of the tests' own, a user's ("session") one with nothing but its own folders, and domains.

As root it runs as another user, as does its QEMU: what we make has to be given to that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.guest import find_kernel, make_initramfs
from tests.machine import LIMIT_S, eventually, listens

# libvirtd asks for the name of its user: one that every system has (nobody).
_UID = 65534

DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>96</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>
  <cpu mode='maximum'/>
  <devices>
    <emulator>{qemu}</emulator>
    {devices}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
_BOOT = (
    "<kernel>{folder}/vmlinuz</kernel><initrd>{folder}/initrd</initrd><cmdline>console=ttyS0 quiet "
    "panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check</cmdline>"
)
_CONSOLES = """\
<serial type='file'><source path='{folder}/{name}.console'/><target port='0'/></serial>
<serial type='unix'><source mode='bind' path='{folder}/{name}.port'/><target port='1'/></serial>
"""


class Libvirtd:
    """The daemon, and what a test does with it as an administrator does."""

    def __init__(self, daemon: str, virsh: str, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "run" / "libvirt" / "libvirt-sock"
        self.uri = f"qemu:///session?socket={self.socket}"
        self._daemon, self._virsh = daemon, virsh
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("config/libvirt", "cache", "run/libvirt", "data", "home"):
            (folder / name).mkdir(parents=True)
        (folder / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        (folder / "config/libvirt/libvirtd.conf").write_text('auth_unix_rw = "none"\n')
        self.give(folder)
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def give(self, path: Path) -> None:
        """Give it, and what is in it, to the daemon's user."""
        if os.geteuid() == 0:
            for place in (path, *path.rglob("*")):
                os.chown(place, _UID, _UID, follow_symlinks=False)

    def start(self) -> None:
        user: dict[str, int | Sequence[int]] = {}
        if os.geteuid() == 0:
            user = {"user": _UID, "group": _UID, "extra_groups": ()}
        places = {"config": "XDG_CONFIG_HOME", "cache": "XDG_CACHE_HOME", "data": "XDG_DATA_HOME"}
        environment = {variable: str(self.folder / name) for name, variable in places.items()}
        environment |= {
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "HOME": str(self.folder / "home"),
        }
        with (self.folder / "libvirtd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._daemon],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **user,  # type: ignore[call-overload]
            )
        assert eventually(lambda: listens(self.socket)), (self.folder / "libvirtd.log").read_text()

    def kill(self) -> None:
        """As a crash: its machines go on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self.start()
        for name in self("list", "--name").split():
            self("destroy", name)
        assert self._process is not None
        self._process.terminate()
        self._process.wait(LIMIT_S)
        shutil.rmtree(self.folder)

    def try_virsh(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._virsh, "-q", "-c", self.uri, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    def __call__(self, *words: str | Path) -> str:
        """Run virsh, which must succeed; its output."""
        done = self.try_virsh(*words)
        assert done.returncode == 0, f"virsh {words}: {done.stderr}"
        return done.stdout

    def define(self, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
            file.write(text)
            file.flush()
            self("define", file.name)


class Console:
    """The port of a guest's script, as `tests.guest` has it, of a domain."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._unread = b""
        self._socket.connect(str(path))

    def close(self) -> None:
        self._socket.close()

    def hear(self, what: str, limit_s: float = LIMIT_S) -> list[str]:
        """What the script says up to the line `what`, without that."""
        said: list[str] = []
        deadline = time.monotonic() + limit_s
        while True:
            while b"\n" not in self._unread:
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    data = self._socket.recv(65536)
                except TimeoutError:
                    raise AssertionError(f"the guest never said {what!r}: {said[-20:]}") from None
                assert data, f"the guest has ended, and never said {what!r}: {said[-20:]}"
                self._unread += data
            raw, _, self._unread = self._unread.partition(b"\n")
            line = raw.decode(errors="replace").rstrip("\r")
            assert not line.startswith("failed"), line
            if line == what:
                return said
            said.append(line)

    def tell(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")


@contextlib.contextmanager
def started_libvirtd(daemon: str, virsh: str) -> Iterator[Libvirtd]:
    # A short path: sockets of libvirt's lie four folders deeper.
    folder = Path(tempfile.mkdtemp(prefix="vmapipe-lv-", dir="/tmp"))
    folder.chmod(0o711)
    libvirtd = Libvirtd(daemon, virsh, folder)
    try:
        yield libvirtd
    finally:
        libvirtd.close()


def disk_xml(
    name: str, path: Path, image_format: str = "raw", bus: str = "virtio", more: str = ""
) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{image_format}'/>"
        f"<source file='{path}'/><target dev='{name}' bus='{bus}'/>{more}</disk>"
    )


def domain_xml(
    libvirtd: Libvirtd, qemu: str, name: str, uuid: str, devices: str, *, boots: bool = False
) -> str:
    """`boots`: the guest of `make_guest`, whose script has the port NAME.port."""
    where = {"folder": str(libvirtd.folder), "name": name}
    return DOMAIN.format(
        name=name,
        uuid=uuid,
        qemu=qemu,
        boot=_BOOT.format(**where) if boots else "",
        devices=devices + (_CONSOLES.format(**where) if boots else ""),
    )


def make_guest(libvirtd: Libvirtd, busybox: str, script: str, **more: object) -> None:
    """The kernel and the initramfs of domains that boot, where libvirt's QEMU can read them."""
    kernel = find_kernel()
    assert kernel is not None
    shutil.copyfile(kernel.image, libvirtd.folder / "vmlinuz")
    initrd = make_initramfs(kernel, Path(busybox), script, **more)  # type: ignore[arg-type]
    (libvirtd.folder / "initrd").write_bytes(initrd)
    libvirtd.give(libvirtd.folder / "vmlinuz")
    libvirtd.give(libvirtd.folder / "initrd")
