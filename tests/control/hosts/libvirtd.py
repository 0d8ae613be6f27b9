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

import psutil

from tests.control.qemu.agent import with_agent
from tests.control.qemu.running_guest import SCRIPT, RunningGuest
from tests.guest import ScriptPort, find_kernel, make_initramfs
from tests.machine import LIMIT_S, Need, eventually, listens
from vmapipe.runtime.syscalls import readable

# libvirtd asks for the name of its user: one that every system has (nobody).
_UID = 65534

DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
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
_PORTS = """\
<serial type='file'><source path='{folder}/{name}.console'/><target port='0'/></serial>
<serial type='unix'><source mode='bind' path='{folder}/{name}.port'/><target port='1'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
"""


class Libvirtd:
    """The daemon, and what a test does with it as an administrator does."""

    def __init__(self, daemon: str, virsh: str, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "run" / "libvirt" / "libvirt-sock"
        self.uri = f"qemu:///session?socket={self.socket}"
        self._daemon, self._virsh = daemon, virsh
        self.pid = 0
        for name in ("config/libvirt", "cache", "run/libvirt", "data", "home"):
            (folder / name).mkdir(parents=True)
        (folder / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        (folder / "config/libvirt/libvirtd.conf").write_text('auth_unix_rw = "none"\n')
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.give(folder)
        # As /var/tmp.
        os.chown(self.scratch, os.geteuid(), -1)
        self.scratch.chmod(0o1777)
        self.start()

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
        log = self.folder / "libvirtd.log"
        log.touch()
        self.give(log)
        # Through a shell that ends: no child of a test, in the middle of which it may be started again.
        done = subprocess.run(
            ["/bin/sh", "-c", '"$0" </dev/null >>"$1" 2>&1 & echo $!', self._daemon, log],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
            cwd="/",
            **user,  # type: ignore[call-overload]
        )
        self.pid = int(done.stdout)
        assert eventually(lambda: listens(self.socket)), log.read_text()

    def kill(self) -> None:
        """As a crash: its machines go on."""
        psutil.Process(self.pid).kill()
        assert eventually(lambda: not psutil.pid_exists(self.pid))

    def close(self) -> None:
        if not psutil.pid_exists(self.pid):
            self.start()
        for name in self("list", "--name").split():
            self("destroy", name)
        psutil.Process(self.pid).terminate()
        assert eventually(lambda: not psutil.pid_exists(self.pid))
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


class Console(ScriptPort):
    """The port of a guest's script, of a domain."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._unread = b""
        self._said: list[str] = []
        self._socket.connect(str(path))

    def close(self) -> None:
        self._socket.close()

    def tell(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def _line(self, deadline: float) -> str | None:
        while b"\n" not in self._unread:
            if not readable([self._socket.fileno()], max(0.0, deadline - time.monotonic())):
                return None
            data = self._socket.recv(65536)
            assert data, "the guest has ended"
            self._unread += data
        raw, _, self._unread = self._unread.partition(b"\n")
        line = raw.decode(errors="replace").rstrip("\r")
        assert not line.startswith("failed"), line
        self._said.append(line)
        return line

    def _last_words(self) -> str:
        return "\n".join(self._said[-20:])


class DomainGuest(RunningGuest):
    """A guest of `running_guest`'s that runs as a domain."""

    def __init__(self, libvirtd: Libvirtd, name: str, console: Console) -> None:
        self.libvirtd, self.name = libvirtd, name
        self.console = console  # type: ignore[assignment]
        self.rounds = 0

    def is_untouched(self) -> None:
        """libvirt has nothing of ours: no job, checkpoint or file; the guest runs."""
        info = self.libvirtd("domjobinfo", self.name)
        assert info.split() == ["Job", "type:", "None"], info
        assert self.libvirtd("checkpoint-list", "--name", self.name).split() == []
        assert self.libvirtd("domstate", self.name).strip() == "running"
        assert os.listdir(self.libvirtd.scratch) == []
        left = [path.name for path in self.libvirtd.folder.rglob("vmapipe-*")]
        assert left == []

    def close(self) -> None:
        self.console.close()


@contextlib.contextmanager
def booted_domain(
    libvirtd: Libvirtd, need: Need, agent: Path, name: str, disks: Sequence[Path]
) -> Iterator[DomainGuest]:
    """A domain whose guest has these two disks (see `make_images`), and the agent."""
    qemu, busybox = need("qemu-system-x86_64", "busybox")
    kernel = find_kernel()
    assert kernel is not None
    shutil.copyfile(kernel.image, libvirtd.folder / "vmlinuz")
    extra = with_agent(agent, Path("unused"))
    script = f"{extra.script}\nsecond=/dev/vdb{SCRIPT}"
    initrd = make_initramfs(kernel, Path(busybox), script, extra.modules, extra.files)
    (libvirtd.folder / "initrd").write_bytes(initrd)
    for path in (*disks, libvirtd.folder / "vmlinuz", libvirtd.folder / "initrd"):
        libvirtd.give(path)
    devices = [
        disk_xml(target, path, "qcow2" if path.suffix == ".qcow2" else "raw")
        for target, path in zip(("vda", "vdb"), disks, strict=True)
    ]
    libvirtd.define(domain_xml(libvirtd, qemu, name, "".join(devices), boots=True))
    libvirtd("start", name)
    with contextlib.closing(Console(libvirtd.folder / f"{name}.port")) as console:
        guest = DomainGuest(libvirtd, name, console)
        console.hear("round 1")
        guest.rounds = 1
        yield guest
        libvirtd.try_virsh("destroy", name)
    libvirtd("undefine", name)


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
    libvirtd: Libvirtd, qemu: str, name: str, devices: str, *, boots: bool = False
) -> str:
    """`boots`: with a kernel, whose script has the port NAME.port, and a channel for the agent."""
    where = {"folder": str(libvirtd.folder), "name": name}
    return DOMAIN.format(
        name=name,
        qemu=qemu,
        boot=_BOOT.format(**where) if boots else "",
        devices=devices + (_PORTS.format(**where) if boots else ""),
    )
