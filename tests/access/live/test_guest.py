# SPDX-License-Identifier: Apache-2.0
"""A guest that runs from an archive while its disks are restored, and writes all the time."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.access.live.machines import cleared, live, processes, server_below, stop
from tests.conftest import absent
from tests.control.qemu.running_guest import is_clean
from tests.guest import SCSI_MODULES, Guest, Kernel, booted, find_kernel, make_initramfs
from tests.machine import VMAPIPE, Need, eventually, good, listens
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

SYSTEM_BYTES = 40 << 20
# Of the second disk, the first 8 MiB are written to, and the others compared with what they were.
DATA_MIB, WRITTEN_MIB = 40, 8
#: The disks take minutes: what happens meanwhile has all the time that it needs.
SLOW = ("--speed", "256K")

# Each round writes its number to both disks, and reads what it has never read before.
SCRIPT = """
until [ -b /dev/sda ]; do true; done
mount -t ext4 /dev/vda /mnt
number() { dd if=$1 bs=8 count=1 2>/tmp/words; }
n=0
while true; do
    [ $n -eq 0 ] || [ "$(number /mnt/counter)" = $(printf '%%08d' $n) ] || say failed: counter at $n
    n=$((n + 1))
    printf '%%08d' $n | dd of=/dev/sda bs=8 conv=notrunc,fsync 2>/tmp/words || say failed: write
    printf '%%08d' $n | dd of=/mnt/counter bs=8 conv=notrunc,fsync 2>/tmp/words || say failed: file
    dd if=/dev/urandom of=/mnt/file$((n %% 4)) bs=64k count=4 conv=fsync 2>/tmp/words
    k=$((n %% %d + %d))
    dd if=/dev/sda of=/tmp/piece bs=1M skip=$k count=1 iflag=direct 2>/tmp/words || say failed: read
    set -- $(md5sum /tmp/piece)
    case " %s " in *" $k:$1 "*) ;; *) say failed: MiB $k is not as it was ;; esac
    say round $n
done
"""


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = find_kernel()
    if found is None:
        absent("a kernel for a guest; scripts/setup unpacks Debian's into .venv/kernel")
    return found


class Machine:
    """The archive, QEMU's command, and the disks as they were."""

    def __init__(self, need: Need, kernel: Kernel, folder: Path) -> None:
        mkfs, busybox, self.qemu = need("mkfs.ext4", "busybox", "qemu-system-x86_64")
        need("qemu-img", "e2fsck", "debugfs")
        self.folder, self.kernel = folder, kernel
        system, self.data = folder / "a.raw", folder / "b.raw"
        with system.open("wb") as file:
            file.truncate(SYSTEM_BYTES)
        subprocess.run([mkfs, "-q", "-F", system], check=True)
        content = random.Random(4).randbytes(DATA_MIB << 20)
        self.data.write_bytes(content)
        pieces = range(WRITTEN_MIB, DATA_MIB)
        sums = " ".join(
            f"{k}:{hashlib.md5(content[k << 20 : (k + 1) << 20], usedforsecurity=False).hexdigest()}"
            for k in pieces
        )
        script = SCRIPT % (len(pieces), WRITTEN_MIB, sums)
        (folder / "initramfs").write_bytes(
            make_initramfs(kernel, Path(busybox), script, SCSI_MODULES)
        )
        self.initramfs = folder / "initramfs"
        self.archive = folder / "vm.vma.zst"
        disks = ("--disk", f"drive-virtio0={system}", "--disk", f"drive-scsi0={self.data}")
        good("backup", "--quiet", "--compress", "zstd", *disks, str(self.archive))

    def command(self, said: Path) -> list[str]:
        """QEMU's, as its user would write it."""
        return [
            *(self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128"),
            *("-serial", f"file:{said}.kernel", "-serial", f"file:{said}"),
            *("-kernel", str(self.kernel.image), "-initrd", str(self.folder / "initramfs")),
            "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check",
            *("-device", "virtio-scsi-pci", "-device", "virtio-blk-pci,drive=drive-virtio0"),
            *("-device", "scsi-hd,drive=drive-scsi0"),
        ]


class Said:
    """What a guest has said into a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rounds(self) -> int:
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        assert "failed" not in text, text[-2000:]
        found = re.findall(r"round (\d+)\r?\n", text)
        return int(found[-1]) if found else 0

    def goes_on(self, rounds: int = 3) -> None:
        first = self.rounds()
        assert eventually(lambda: self.rounds() >= first + rounds), self.path.read_text()[-2000:]

    def is_unharmed(self) -> None:
        kernel = Path(f"{self.path}.kernel").read_text(errors="replace")
        assert not [line for line in kernel.splitlines() if "error" in line.lower()]


@pytest.fixture(scope="module")
def machine(need: Need, kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(need, kernel, tmp_path_factory.mktemp("live"))


def qemu_of(folder: Path) -> psutil.Process:
    (process,) = [each for each in processes(f"{folder}/qmp.sock") if "qemu" in each.name()]
    return process


def check_disks(need: Need, machine: Machine, last: int, system: Path, data: Path) -> None:
    """The machine has ended: its disks have what it wrote, and else what was in the archive."""
    content = data.read_bytes()
    assert content[WRITTEN_MIB << 20 :] == machine.data.read_bytes()[WRITTEN_MIB << 20 :]
    # It was killed: a round may have been half said.
    assert int(content[:8]) in (last, last + 1)
    assert is_clean(need, system)
    (debugfs,) = need("debugfs")
    counter = subprocess.run(
        [debugfs, "-R", "cat /counter", system], capture_output=True, check=True
    )
    assert int(counter.stdout) in (last, last + 1)


def user_machine(folder: Path, socket: Path) -> list[str]:
    """QEMU's disks as in the manual: on overlays above the exports of `vmapipe serve`."""
    words = ["-qmp", f"unix:{folder}/q,server=on,wait=off"]
    for name in ("drive-virtio0", "drive-scsi0"):
        overlay, uri = folder / f"{name}.qcow2", f"nbd+unix:///{name}?socket={socket}"
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay)]
        subprocess.run(make, check=True)
        nbd = f"driver=nbd,node-name=n-{name},server.type=unix,server.path={socket},export={name}"
        words += ["-blockdev", f"{nbd},reconnect-delay=20,read-only=on"]
        words += ["-blockdev", f"driver=file,node-name=f-{name},filename={overlay}"]
        words += ["-blockdev", f"driver=qcow2,node-name={name},file=f-{name},backing=n-{name}"]
    stops = "rerror=stop,werror=stop"
    return [
        *words,
        *("-device", "virtio-scsi-pci", "-device", f"virtio-blk-pci,drive=drive-virtio0,{stops}"),
        *("-device", f"scsi-hd,drive=drive-scsi0,id=scsi0,{stops}"),
    ]


class Rounds:
    """Of a guest that speaks to the test."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.latest = 0

    def goes_on(self) -> None:
        for line in [*self.guest.has_said(), self.guest.hear_next(), self.guest.hear_next()]:
            self.latest = int(line.removeprefix("round "))


def test_a_guest_writes_on_while_its_disks_move_whoever_is_killed(
    need: Need, machine: Machine, tmp_path: Path, out: Path
) -> None:
    sock, qmp = tmp_path / "s", tmp_path / "q"
    device = f"drive-scsi0={out}/b.qcow2,format=qcow2"
    first = (*SLOW, machine.archive, out, "--device", "drive-virtio0", "--device", device)
    with (
        cleared(sock),
        subprocess.Popen(
            [*VMAPIPE, "serve", "--quiet", str(machine.archive), "--listen", str(sock)]
        ) as server,
    ):
        assert eventually(lambda: listens(sock))
        words = user_machine(tmp_path, sock)
        with booted(machine.qemu, machine.kernel, machine.initramfs, words) as guest:
            rounds = Rounds(guest)
            rounds.goes_on()
            with live(*first, "--qmp", qmp) as command:
                command.hear("progress")
                command.hear("progress")  # the copies have begun
                # The user's server dies; another one stands in for it, and dies, too.
                server.kill()
                command.hear("notice", "was started again")
                rounds.goes_on()
                stop(one_server(sock))
                command.hear("notice", "was started again")
                rounds.goes_on()
                # Ctrl-C: the machine does not need the command.
                command.process.send_signal(signal.SIGINT)
                assert command.end()[0] == 130
            rounds.goes_on()
            # Nobody serves the archive any more, until the command is said again.
            stop(one_server(sock))
            with live(machine.archive, out) as last:
                last.succeeds()
            assert set(command.moved + last.moved) == {"drive-virtio0", "drive-scsi0"}
            assert not processes(f"--listen {sock}")
            rounds.goes_on()
            assert sorted(os.listdir(out)) == ["b.qcow2", "disk-drive-virtio0.raw"]
            stop(psutil.Process(guest.process.pid), signal.SIGTERM)
            for line in guest.has_said():
                rounds.latest = int(line.removeprefix("round "))
            assert not [line for line in guest.kernel_log if "error" in line.lower()]
    data = tmp_path / "b.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", out / "b.qcow2", data], check=True)
    check_disks(need, machine, rounds.latest, out / "disk-drive-virtio0.raw", data)


def one_server(sock: Path) -> psutil.Process:
    (server,) = processes(f"--listen {sock}")
    return server


@pytest.mark.soak
def test_a_machine_runs_from_the_archive_and_its_disks_arrive_whoever_is_killed(
    need: Need, machine: Machine, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", Said(tmp_path / "said")
    words = (*SLOW, machine.archive, out)
    device = f"drive-scsi0={out}/b.qcow2,format=qcow2"
    first = (*words, "--device", "drive-virtio0", "--device", device)

    with cleared(out):
        with live(*first, "--", *machine.command(said.path)) as command:
            command.hear("notice", "the machine is started")
            said.goes_on()
            # The server dies, and is started again on the same socket.
            stop(server_below(out))
            command.hear("notice", "was started again")
            said.goes_on()
            # Ctrl-C: the machine does not need the command.
            command.process.send_signal(signal.SIGINT)
            assert command.end()[0] == 130
        said.goes_on()
        # Both die.
        with live(*words) as again:
            again.hear("progress")
            again.kill()
        stop(server_below(out))
        with live(machine.archive, out) as last:
            last.succeeds()
        assert set(command.moved + again.moved + last.moved) == {"drive-virtio0", "drive-scsi0"}
        said.goes_on()
        # Nothing of ours is left but the machine and its disks.
        assert sorted(os.listdir(out)) == [
            *("b.qcow2", "disk-drive-virtio0.raw", "qemu.log", "qmp.sock"),
        ]
        qemu = qemu_of(out)
        assert processes(f"{out}/") == [qemu]
        stop(qemu, signal.SIGTERM)
    said.is_unharmed()
    data = tmp_path / "b.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", out / "b.qcow2", data], check=True)
    check_disks(need, machine, said.rounds(), out / "disk-drive-virtio0.raw", data)


@pytest.mark.soak
def test_a_machine_that_ends_or_stands_still_goes_on_where_it_was(
    need: Need, machine: Machine, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", Said(tmp_path / "said")
    start: tuple[str | Path, ...] = (machine.archive, out, "--", *machine.command(said.path))
    with cleared(out):
        with live(*SLOW, *start) as command:
            said.goes_on()
            # As when the host loses its power: what was flushed has to be there.
            stop(qemu_of(out))
            code, text = command.end()
            assert (code, "to start it again where it was" in text) == (1, True)
            assert f"{out} -- {machine.qemu}" in text
        said.path.rename(f"{said.path}.before")
        with live(*SLOW, *start) as command:
            command.hear("notice", "the machine is started")
            said.goes_on()
            # All of ours is killed; the machine stands still as soon as it needs the archive.
            command.kill()
            stop(server_below(out))
        client = QmpClient(f"{out}/qmp.sock")
        asked = Command("query-status", {})
        assert eventually(lambda: client.execute(asked)["status"] == "io-error")
        client.close()
        with live(machine.archive, out) as last:
            last.succeeds()
        assert [e for e in last.events if "stands still" in str(e.get("text"))]
        assert [e for e in last.events if e.get("text") == "the machine goes on"]
        said.goes_on()
        stop(qemu_of(out), signal.SIGTERM)
    said.is_unharmed()
    check_disks(
        need, machine, said.rounds(), *(out / f"disk-drive-{n}.raw" for n in ("virtio0", "scsi0"))
    )
