# SPDX-License-Identifier: Apache-2.0
"""Domains that run from an archive while their disks arrive, whatever of ours, or of libvirt's, dies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.access.bootable import SYSTEM_OFFSET, make_bootable
from tests.conftest import absent
from tests.control.hosts.bench import BOOT_SECTOR, WEB, Bench
from tests.control.hosts.libvirtd import Libvirtd, disk_xml
from tests.control.qemu.running_guest import is_clean
from tests.guest import find_kernel
from tests.machine import (
    LIMIT_S,
    VMAPIPE,
    Need,
    bad,
    end_of,
    eventually,
    good,
    make_disk,
    next_event,
    started,
)
from vmapipe.access.machine.domain_xml import parse_xml
from vmapipe.control.hosts.libvirt.live import live_folder_of
from vmapipe.control.hosts.libvirt.live_carrier import disks_now
from vmapipe.runtime.errors import Failure

DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"
MIB = 1 << 20
# A machine without these rights to memory does not start, which no check of its definition tells.
HUGE = WEB.replace("unit='MiB'>256<", "unit='TiB'>900<")


@pytest.fixture(scope="module")
def old(bench: Bench) -> Path:
    """The volume of a domain `web` that is there, shut off."""
    disk = make_disk(bench.folder / "old.raw", "A")
    archive = bench.archive("old.vma", WEB, f"vda={disk}")
    good(*bench.words(archive, "--pool", "p"))
    return bench.pool / "web-vda.qcow2"


def servers(folder: Path) -> list[psutil.Process]:
    """The archive's servers of a live restore in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "serve" in words and str(folder / "web.live" / "archive.sock") in words:
            found.append(process)
    return found


def write(libvirt: Libvirtd, pattern: int, offset: int) -> None:
    """Write 64 KiB as the guest does: a whole cluster of the overlay, which needs nothing from below."""
    words = f'qemu-io -d {DEVICE} "write -P {pattern} {offset} 64k"'
    libvirt("qemu-monitor-command", "web", "--hmp", words)


def source(libvirt: Libvirtd, *flags: str) -> str:
    text = libvirt("dumpxml", *flags, "web")
    return disks_now(parse_xml(text.encode()))["vda"].source


def apply(disk: Path, data: bytes, offset: int) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_machine_that_does_not_start_leaves_the_one_before_as_it_was(
    bench: Bench, old: Path
) -> None:
    disk = make_disk(bench.folder / "huge.raw", "A")
    archive = bench.archive("huge.vma", HUGE, f"vda={disk}")
    before, definition = bench.state(), bench.libvirt("dumpxml", "web").splitlines()
    said = bad(*bench.words(archive, "--pool", "p", "--live", "--overwrite"))
    assert "the domain web does not start: " in said
    assert bench.state() == before
    # libvirt sorts some elements as it likes.
    assert sorted(bench.libvirt("dumpxml", "web").splitlines()) == sorted(definition)
    assert not servers(bench.pool)


def test_a_machine_runs_from_its_archive_and_goes_on_whatever_ends(bench: Bench, old: Path) -> None:
    disk = make_disk(bench.folder / "live.raw", "ApA0h" * 50)
    apply(disk, BOOT_SECTOR, 0)
    apply(disk, bytes(512), 512)
    archive = bench.archive("live.vma", WEB, f"vda={disk}")
    libvirt, folder = bench.libvirt, bench.pool / "web.live"
    overlay, target = str(folder / "vda.qcow2"), str(bench.pool / "web-vda-1.qcow2")
    words = bench.words(archive, "--pool", "p", "--live", "--start", "--overwrite", "--json")
    with started(*words, "--speed", "1M") as command:
        assert next_event(command, "restoring")["devices"][0]["path"] == target
        assert eventually(lambda: "mirror" in libvirt("dumpxml", "web"))
        (server,) = servers(bench.pool)
        server.kill()
        write(libvirt, 7, MIB)
        while "had ended and was started again" not in next_event(command, "notice")["text"]:
            pass
        # It stands still for as long as QEMU takes to connect again.
        assert eventually(lambda: libvirt("domstate", "web").strip() == "running")
        command.send_signal(signal.SIGINT)
        out, _ = command.communicate(timeout=LIMIT_S)
    assert command.returncode == 130
    told = [json.loads(line) for line in out.splitlines()]
    assert any("to go on: vmapipe restore" in event.get("text", "") for event in told)
    write(libvirt, 8, 8 * MIB)
    # Without --live it is another restore, which is not made over this one.
    assert "is being restored live" in bad(*words[:-4], code=2)
    # The machine's host dies: the definition has what was written.
    assert source(libvirt) == source(libvirt, "--inactive") == overlay
    libvirt("destroy", "web")
    assert eventually(lambda: not servers(bench.pool))
    # Not without the archive, of which nobody would know that it has to be served.
    assert libvirt.try_virsh("start", "web").returncode == 1
    with started(*words) as command:
        code, said = end_of(command)
    assert (code, said) == (0, "")
    assert source(libvirt) == source(libvirt, "--inactive") == target
    assert libvirt("domstate", "web").strip() == "running"
    assert "error_policy" not in libvirt("dumpxml", "--inactive", "web")
    write(libvirt, 9, 12 * MIB)
    for pattern, offset in ((7, MIB), (8, 8 * MIB), (9, 12 * MIB)):
        apply(disk, bytes([pattern]) * 65536, offset)
    # What the guest writes when it has booted.
    apply(disk, BOOT_SECTOR, 512)
    nodes = libvirt("qemu-monitor-command", "web", '{"execute": "query-named-block-nodes"}')
    assert "live-restore" not in nodes
    libvirt("destroy", "web")
    subprocess.run(
        ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(disk), target], check=True
    )
    assert bench.state() == ({"web"}, {"web-vda-1.qcow2"}, [])
    assert not servers(bench.pool)
    libvirt("undefine", "web")


def test_notes_that_others_could_have_written_are_not_used(tmp_path: Path) -> None:
    """They say what is written and removed, with root's rights; a pool may be QEMU's user's."""
    folder = tmp_path / "web.live"
    folder.mkdir(mode=0o711)
    for name in ("live-restore.json", "domain.json"):
        (folder / name).write_text('{"version": 1, "uuid": "u", "drivers": {}, "old": []}')
    disk = disk_xml("vda", folder / "vda.qcow2")
    text = f"<domain><devices>{disk}</devices></domain>"
    assert live_folder_of("web", "u", [text]) == str(folder)
    assert live_folder_of("web", "another", [text]) == ""
    folder.chmod(0o777)
    with pytest.raises(Failure, match="others can write there"):
        live_folder_of("web", "u", [text])


# A machine that finds its disks not as it left them powers off: see the prologue of `make_initramfs`.
SCRIPT = """
until [ -b /dev/vdb ]; do true; done
mount -t ext4 /dev/vda2 /mnt
number() { dd if=$1 bs=8 count=1 2>/tmp/words; }
m=$(number /dev/vdb | sed 's/^0*//'); n=$(number /mnt/counter | sed 's/^0*//')
m=${m:-0}; n=${n:-0}
[ $m -eq $n ] || [ $m -eq $((n + 1)) ]
n=$m
while true; do
    n=$((n + 1))
    printf '%%08d' $n | dd of=/dev/vdb bs=8 conv=notrunc,fsync 2>/tmp/words
    printf '%%08d' $n | dd of=/mnt/counter bs=8 conv=notrunc,fsync 2>/tmp/words
    [ "$(number /dev/vdb)" = "$(number /mnt/counter)" ]
    dd if=/dev/urandom of=/mnt/file$((n %% 4)) bs=64k count=4 conv=fsync 2>/tmp/words
    k=$((n %% %d + %d))
    dd if=/dev/vdb of=/tmp/piece bs=1M skip=$k count=1 iflag=direct 2>/tmp/words
    set -- $(md5sum /tmp/piece)
    case " %s " in *" $k:$1 "*) ;; *) exit 1 ;; esac
done
"""
DATA_MIB, WRITTEN_MIB = 24, 4
TWO_DISKS = WEB.replace(
    "<interface",
    "<disk type='file' device='disk'><driver name='qemu' type='qcow2' iothread='1'/>"
    "<source file='/host/data.qcow2'/><target dev='vdb' bus='virtio'/></disk><interface",
).replace("<vcpu>", "<iothreads>1</iothreads><vcpu>")


# How a command may end because of something else that was killed.
_OF_WHAT_WAS_KILLED = ("has ended", "does not start", "cannot reach libvirt")


class Soak:
    """A machine that is restored live again and again, and what may happen to it."""

    def __init__(self, bench: Bench, words: Sequence[str | Path]) -> None:
        self.bench, self.words = bench, words
        self.command: subprocess.Popen[bytes] | None = None

    def run(self, *more: str) -> subprocess.Popen[bytes]:
        if self.command is None:
            log = (self.bench.folder / "command.log").open("ab")
            self.command = subprocess.Popen(
                [*VMAPIPE, *map(str, self.words), *more], stdout=log, stderr=log
            )
            log.close()
        return self.command

    def kill_command(self) -> None:
        if self.command is not None:
            self.command.kill()
            self.command.wait()
            self.command = None

    def kill_server(self) -> None:
        for server in servers(self.bench.pool):
            with suppress(psutil.NoSuchProcess):
                server.kill()

    def kill_daemon(self) -> None:
        self.bench.libvirt.kill()
        self.bench.libvirt.start()

    def kill_machine(self) -> None:
        """As its host's power cut, but for what the host's kernel has not written yet."""
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or [])
            if "guest=web," in words and f"{self.bench.libvirt.folder}/" in words:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def has_ended(self, limit_s: float) -> bool:
        """Whether all is restored; a command that fails for another reason than a kill is an error."""
        with suppress(subprocess.TimeoutExpired):
            code = self.run("--speed", "1M").wait(limit_s)
            self.command = None
            if code:
                log = (self.bench.folder / "command.log").read_text().splitlines()[-1]
                assert any(text in log for text in _OF_WHAT_WAS_KILLED), log
            return code == 0
        return False

    def goes_on_under(self, chance: random.Random, kills: int) -> None:
        """Restore all, while one or several are killed so often."""
        kill = (self.kill_command, self.kill_server, self.kill_daemon, self.kill_machine)
        for number in range(kills):
            if self.has_ended(chance.uniform(0.0, 6.0)):
                print(f"all was restored after {number} rounds of kills")
                return
            for act in kill:
                if chance.random() < (0.1 if act == self.kill_machine else 0.4):
                    act()
        while not self.has_ended(LIMIT_S):
            pass


@pytest.mark.soak
def test_a_machine_that_writes_is_moved_whole_whatever_is_killed_when(
    need: Need, bench: Bench, tmp_path: Path
) -> None:
    kernel = find_kernel()
    (debugfs,) = need("debugfs")
    if kernel is None:
        absent("Debian's cloud kernel")
    chance = random.Random(os.environ.get("SOAK_SEED", "5"))
    content = b"00000000" + chance.randbytes((DATA_MIB << 20) - 8)
    data, system = bench.folder / "data.raw", bench.folder / "system.raw"
    data.write_bytes(content)
    pieces = range(WRITTEN_MIB, DATA_MIB)
    sums = " ".join(
        f"{k}:{hashlib.md5(content[k << 20 : (k + 1) << 20], usedforsecurity=False).hexdigest()}"
        for k in pieces
    )
    script = SCRIPT % (len(pieces), WRITTEN_MIB, sums)
    make_bootable(need, kernel, tmp_path / "parts", system, "rdinit=/init", script=script)
    write_counter = [
        "-w",
        "-R",
        f"write {tmp_path / 'zero'} counter",
        f"{system}?offset={SYSTEM_OFFSET}",
    ]
    (tmp_path / "zero").write_text("00000000")
    subprocess.run([debugfs, *write_counter], check=True, capture_output=True)
    archive = bench.archive("soak.vma", TWO_DISKS, f"vda={system}", f"vdb={data}")
    libvirt = bench.libvirt
    soak = Soak(bench, bench.words(archive, "--pool", "p", "--live", "--format", "raw"))
    soak.goes_on_under(chance, int(os.environ.get("SOAK_KILLS", "100")))
    before = libvirt("domblkstat", "web", "vdb")
    assert eventually(lambda: libvirt("domblkstat", "web", "vdb") != before)
    assert not servers(bench.pool)
    libvirt("destroy", "web")
    target = bench.pool / "web-vda.raw"
    # By itself: e2fsck forgets an offset when it has replayed a journal.
    part = tmp_path / "part.raw"
    part.write_bytes(target.read_bytes()[SYSTEM_OFFSET:])
    assert is_clean(need, part)
    said = subprocess.run([debugfs, "-R", "cat /counter", part], capture_output=True, check=True)
    counter = (bench.pool / "web-vdb.raw").read_bytes()
    assert int(counter[:8]) - int(said.stdout) in (0, 1)
    assert int(counter[:8]) > 10
    assert counter[8:] == content[8:]
    assert target.read_bytes()[:SYSTEM_OFFSET] == system.read_bytes()[:SYSTEM_OFFSET]
    assert bench.state() == ({"web"}, {"web-vda.raw", "web-vdb.raw"}, [])
    libvirt("undefine", "web")
