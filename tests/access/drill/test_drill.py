# SPDX-License-Identifier: Apache-2.0
"""`vmapipe drill` with machines that boot and with ones that do not: the verdict is right each time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.access.bootable import OVMF, config
from tests.access.drill.lab import (
    BOOT_LIMIT_S,
    EVENTS,
    HANG_LIMIT_S,
    MISPLACED,
    PLAN,
    Drilled,
    Lab,
    damage,
    picture_in,
    uuid_in,
)
from tests.conftest import absent
from tests.guest import Kernel, find_kernel
from tests.machine import LIMIT_S, Need, bad, eventually, good, make_disk, next_event, run, started
from vmapipe.access.drill.result import keep_evidence, read_result
from vmapipe.access.drill.screen import looks_graphical
from vmapipe.access.machine.accelerator import TCG, VARIABLE
from vmapipe.access.machine.argv import Wiring, qemu_words
from vmapipe.access.machine.process import OwnQemu
from vmapipe.access.machine.proxmox import machine_of_proxmox
from vmapipe.access.machine.spec import Limits
from vmapipe.control.qmp.connection import Command
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.syscalls import readable

# The fixture boots several machines, emulated, on a host that may be busy.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> Iterator[None]:
    """As on any host; the probe for KVM has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, TCG)
        yield


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = find_kernel()
    if found is None:
        absent("a kernel for a guest; scripts/setup unpacks Debian's into .venv/kernel")
    return found


@pytest.fixture(scope="module")
def lab(need: Need, kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(need, kernel, tmp_path_factory.mktemp("drill"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def drilled(lab: Lab) -> Mapping[str, Drilled]:
    """All at once: most of them wait for their machine."""
    if not OVMF.exists():
        absent("ovmf")
    plan = lab.folder / "plan.toml"
    plan.write_text(PLAN)
    domain = lab.folder / "domain.xml"
    domain.write_text(MISPLACED)
    uefi = ("bios: ovmf", "machine: q35", "agent: 1")
    slow, quick = f"--timeout={BOOT_LIMIT_S}", f"--timeout={HANG_LIMIT_S}"
    cases: dict[str, tuple[Path, Sequence[str]]] = {
        "bios": (
            lab.archive("bios", "good", "agent: 1", "args: -device evil", "hostpci0: 01:00"),
            (slow, f"--plan={plan}", f"--metrics={lab.folder}/vm.prom"),
        ),
        "uefi": (lab.archive("uefi", "good", *uefi), (slow,)),
        "zeroed": (lab.archive("zeroed", "zeroed", "agent: 1"), (slow,)),
        "broken": (lab.archive("broken", "broken", "agent: 1"), (slow,)),
        "empty": (lab.archive("empty", "empty"), (slow,)),
        "hung": (lab.archive("hung", "hang"), (quick,)),
        "damaged": (damage(lab.archive("damaged", "good")), (slow,)),
        "misplaced": (lab.archive("misplaced", "empty"), (slow, f"--config={domain}")),
    }
    running = {name: (lab.start(a, *words), a) for name, (a, words) in cases.items()}
    return {name: lab.finish(process, archive) for name, (process, archive) in running.items()}


def test_a_good_machine_has_booted_and_each_step_of_the_plan_has_its_answer(
    drilled: Mapping[str, Drilled], lab: Lab
) -> None:
    done = drilled["bios"]
    assert done.code == 0, done.error
    assert done.last["verdict"] == "booted"
    assert done.last["proof"] == "command"
    assert {step["state"] for step in done.last["steps"]} == {"answered"}
    assert done.last["seconds"] > 0
    # A part of the kernel and the initramfs; the whole disk has 58 MiB.
    assert 8 << 20 < done.last["bytes_read"] < 50 << 20
    begun = next(event for event in done.events if event["event"] == "drilling")
    assert {one["key"] for one in begun["left_out"]} == {"args", "hostpci0"}
    result = read_result(str(done.archive), uuid_in(done.archive))
    assert result is not None
    assert (result.verdict, result.proof, result.evidence) == (
        "booted",
        "command",
        "bios.vma.drill",
    )
    assert "restored login:" in done.evidence("screen.txt").decode()
    assert b"restored login:" in done.evidence("serial.log")
    assert not picture_in(done.evidence("screen.png")).is_blank
    metrics = (lab.folder / "vm.prom").read_text()
    assert 'vmapipe_drill_success{drill="vm"} 1' in metrics


def test_a_good_machine_with_uefi_has_booted(drilled: Mapping[str, Drilled]) -> None:
    done = drilled["uefi"]
    assert done.code == 0, done.error
    assert (done.last["verdict"], done.last["proof"]) == ("booted", "agent")
    begun = next(event for event in done.events if event["event"] == "drilling")
    assert begun["firmware"] == "uefi"
    assert b"BdsDxe: starting Boot0001" in done.evidence("serial.log")
    assert not looks_graphical(picture_in(done.evidence("screen.png")))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zeroed", "Booting kernel failed"),
        ("broken", "Kernel panic - not syncing"),
        ("empty", "No bootable device"),
        ("hung", "no login prompt within"),
        ("damaged", "the archive is damaged"),
    ],
)
def test_a_machine_that_does_not_boot_is_told_with_the_reason(
    name: str, reason: str, drilled: Mapping[str, Drilled]
) -> None:
    done = drilled[name]
    assert done.code == 4, done.error
    assert done.last["verdict"] == "not booted"
    assert reason in done.last["reason"]
    assert done.error.count("\n") == 1
    assert reason in done.error
    assert not picture_in(done.evidence("screen.png")).is_blank
    result = read_result(str(done.archive), uuid_in(done.archive))
    assert result is not None
    assert (result.verdict, result.seconds) == ("not booted", None)


def test_the_archives_are_as_they_were(drilled: Mapping[str, Drilled]) -> None:
    for done in drilled.values():
        if done.archive.name == "damaged.vma":
            continue
        good("verify", "--quiet", "--require-manifest", done.archive)


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _is_booting(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "drilling":
            break
    family = _family(process)
    assert any("qemu-system" in child.name() for child in family)
    return family


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_of_the_machine_survives_also_after_a_kill(
    lab: Lab, signum: int, short_folder: Path
) -> None:
    archive = lab.folder / "killed.vma"
    if not archive.exists():
        archive = lab.archive("killed", "hang", "tpmstate0: x,version=v2.0")
    environment = {**os.environ, "TMPDIR": str(short_folder)}
    words = ("drill", "--json", "--no-index-cache", "--timeout=60", archive)
    with started(*words, env=environment) as process:
        family = _is_booting(process)
        process.send_signal(signum)
        process.wait(LIMIT_S)
    assert process.returncode in (-signum, 128 + signum)
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []
    if signum == signal.SIGKILL:
        # What a killed one has left goes with the next, whether that one has seen a screen
        # within its second or is undecided.
        done = run("drill", "--quiet", "--timeout=1", archive, env=environment)
        assert done.returncode in (1, 4), done.stderr
        assert b"within 1 s" in done.stderr
    assert eventually(lambda: not list(short_folder.iterdir()))
    assert not archive.with_name("killed.vma.partial").exists()


def test_a_qemu_that_is_killed_says_nothing_about_the_archive(lab: Lab) -> None:
    archive = lab.archive("shot", "hang")
    process = lab.start(archive, "--timeout=60")
    next(child for child in _is_booting(process) if "qemu-system" in child.name()).kill()
    done = lab.finish(process, archive)
    assert (done.code, done.last["verdict"]) == (1, "undecided")
    assert "killed by SIGKILL" in done.last["reason"]


@pytest.mark.soak  # one more boot
def test_a_machine_that_writes_too_much_is_stopped(lab: Lab) -> None:
    archive = lab.archive("writer", "good")
    process = lab.start(archive, f"--timeout={BOOT_LIMIT_S}", "--scratch-size=4K")
    done = lab.finish(process, archive)
    assert (done.code, done.last["verdict"]) == (1, "undecided")
    assert "--scratch-size" in done.last["reason"]


def test_a_place_that_qemu_refuses_is_given_up_and_that_is_told(
    drilled: Mapping[str, Drilled],
) -> None:
    done = drilled["misplaced"]
    begun = next(event for event in done.events if event["event"] == "drilling")
    told = {one["key"]: one["reason"] for one in begun["left_out"]}
    assert "QEMU does not take them" in told["PCI addresses"]
    assert "No bootable device" in done.last["reason"]


@contextlib.contextmanager
def _running(lab: Lab, folder: Path) -> Iterator[Path]:
    """The machine as a test starts it, up and at work on a disk of its own; its second monitor."""
    disk, monitor = folder / "running.raw", folder / "qmp"
    shutil.copy(lab.disks["good"], disk)
    spec = machine_of_proxmox(config("agent: 1"), ["drive-virtio0"], Limits(1 << 30, 1))
    with (
        OwnFolder("test", str(folder)) as scratch,
        socket.socket(socket.AF_UNIX) as listener,
        contextlib.ExitStack() as stack,
    ):
        place = f"{scratch.path}/console"
        listener.bind(place)
        listener.listen()
        words = qemu_words(spec, Wiring("pc", TCG, place, place, place, f"{scratch.path}/agent"))
        node = {"driver": "file", "filename": str(disk)}
        own = json.dumps({"driver": "raw", "node-name": "disk0", "file": node})
        words = [own if '"nbd"' in word else word for word in words]
        words += ["-qmp", f"unix:{monitor},server=on,wait=off"]
        cancel = Cancel()
        stack.callback(cancel.close)
        machine = stack.enter_context(OwnQemu("the machine", scratch, words, cancel))
        serial = stack.enter_context(listener.accept()[0])
        firmware = stack.enter_context(listener.accept()[0])
        machine.qmp.execute(Command("cont", {}))
        said = b""
        while b"login:" not in said:
            assert readable([serial.fileno(), firmware.fileno()], BOOT_LIMIT_S)
            for console in (serial, firmware):
                if readable([console.fileno()], 0):
                    data = console.recv(65536)
                    assert data
                    said += data
        yield monitor


def test_a_machine_with_its_memory_goes_on_and_one_that_cannot_is_booted(
    lab: Lab, short_folder: Path
) -> None:
    archive, conf = lab.folder / "memory.vma", lab.folder / "memory.conf"
    conf.write_text(config("agent: 1"))
    with _running(lab, short_folder) as monitor:
        words = ("--qmp", monitor, "--state", "--config", f"qemu-server.conf={conf}")
        good("backup", "--quiet", *words, archive)
    slow = f"--timeout={BOOT_LIMIT_S}"
    # The other one has another machine's configuration: QEMU does not take the memory.
    other = lab.folder / "other.conf"
    other.write_text(config("agent: 1", "scsihw: pvscsi", "machine: q35"))
    copy = archive.with_name("copy.vma")
    shutil.copy(archive, copy)
    first, second = lab.start(archive, slow), lab.start(copy, slow, f"--config={other}")
    resumed = lab.finish(first, archive)
    assert resumed.code == 0, resumed.error
    assert (resumed.last["resumed"], resumed.last["proof"]) == (True, "agent")
    assert resumed.last["bytes_read"] < 1 << 20, "it was booted"
    begun = next_event(second, "drilling")
    second.terminate()
    second.communicate(timeout=LIMIT_S)
    assert begun["resumed"] is False
    told = {one["key"]: one["reason"] for one in begun["left_out"]}
    assert "it cannot go on from its memory here" in told["vmstate"]


def test_a_backup_tests_what_it_has_stored_and_has_the_tests_exit_code(
    lab: Lab, tmp_path: Path
) -> None:
    conf, archive = tmp_path / "c.conf", tmp_path / "vm.vma.zst"
    conf.write_text(config())
    words = (
        "--disk",
        f"drive-virtio0={lab.disks['empty']}",
        "--config",
        f"qemu-server.conf={conf}",
    )
    done = run("backup", "--json", "--compress", "zstd", "--drill", *words, archive)
    assert done.returncode == 4
    told = [json.loads(line) for line in done.stdout.decode().splitlines()]
    for event in told:
        EVENTS.validate(event)
    names = [event["event"] for event in told]
    assert names.index("stored") < names.index("done") < names.index("drilled")
    assert "No bootable device" in done.stderr.decode()
    good("verify", "--quiet", archive)
    assert (tmp_path / "vm.vma.zst.drill" / "screen.png").exists()
    for place, reason in (
        ("-", "a file of this host"),
        ("exec:cat", "a file of this host"),
        ("s3://b/k", "a file of this host"),
        ("/dev/null", "is none"),
    ):
        assert reason in bad("backup", "--drill", *words, place, code=2)
    service = ("--archiver=tcp://127.0.0.1:1", "--insecure-plain-tcp")
    assert "a file of this host" in bad("backup", "--drill", *service, *words, "x.vma", code=2)
    assert "belongs to --drill" in bad("backup", "--drill-plan=x", *words, archive, code=2)


def test_beside_an_encrypted_archive_only_the_verdict_is_kept(
    lab: Lab, tmp_path: Path, need: Need
) -> None:
    (keygen,) = need("age-keygen")
    key, archive = tmp_path / "key", tmp_path / "vm.vma.age"
    subprocess.run([keygen, "-o", key], check=True, capture_output=True)
    recipient = subprocess.run([keygen, "-y", key], check=True, capture_output=True, text=True)
    words = ("--disk", f"drive-virtio0={lab.disks['empty']}", "--encrypt-to")
    good("backup", "--quiet", *words, recipient.stdout.strip(), archive)
    told = ("drill", "--no-index-cache", "--identity", key, archive)
    assert "finds nothing to boot" in bad(*told, code=4)
    result = read_result(str(archive), _uuid_of(archive, key))
    assert result is not None
    assert (result.reason, result.steps, result.left_out, result.evidence) == ("", (), (), "")
    assert not (tmp_path / "vm.vma.age.drill").exists()
    bad(*told, "--keep", tmp_path / "kept", code=4)
    assert (tmp_path / "kept" / "result.json").exists()


def _uuid_of(archive: Path, key: Path) -> bytes:
    listed = json.loads(good("list", "--json", "--identity", key, archive))
    return uuid.UUID(listed["uuid"]).bytes


def test_what_a_test_has_kept_goes_with_its_archive(tmp_path: Path) -> None:
    for day in (1, 2):
        archive = tmp_path / f"vm-2020-01-0{day}.vma"
        archive.write_bytes(b"x")
        (tmp_path / f"{archive.name}.drill.json").write_text("{}")
        keep_evidence(str(archive) + ".drill", {"screen.png": b"x", "serial.log": b"y"})
    good("prune", tmp_path, "--keep-last", "1", "--yes")
    left = sorted(os.listdir(tmp_path))
    assert left == [f"vm-2020-01-02.vma{end}" for end in ("", ".drill", ".drill.json")]


def test_what_cannot_be_tested_is_refused_in_one_line(lab: Lab, tmp_path: Path) -> None:
    archive = lab.archive("refused", "empty")
    text = bad("drill", "--memory=1M", archive, code=2)
    assert "64M at least" in text
    assert "--cpus" in bad("drill", "--cpus=0", archive, code=2)
    assert "from 1 to" in bad("drill", "--timeout=x", archive, code=2)
    assert "No such file" in bad("drill", "--plan=/no/such", archive)
    assert "No such file" in bad("drill", "--config=/no/such", archive)
    assert "cannot be read at any place" in bad("drill", "-", code=2)
    (tmp_path / "p.toml").write_text("x")
    assert "not valid TOML" in bad("drill", f"--plan={tmp_path}/p.toml", archive, code=2)
    (tmp_path / "c.conf").write_text("arch: aarch64\nvirtio0: x\n")
    assert "only x86_64" in bad("drill", f"--config={tmp_path}/c.conf", archive)
    disk = make_disk(tmp_path / "d", "A")
    good("backup", "--disk", disk, tmp_path / "vm.vma")
    (tmp_path / "no-qemu").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "no-qemu")}
    text = bad("drill", "--quiet", tmp_path / "vm.vma", env=environment)
    assert "Debian: qemu-system-x86" in text
    assert not (tmp_path / "vm.vma.drill.json").exists()


def test_an_archive_without_a_configuration_is_tried_and_that_is_said(
    lab: Lab, tmp_path: Path
) -> None:
    archive = tmp_path / "plain.vma"
    good("backup", "--quiet", "--disk", f"web.raw={lab.disks['empty']}", archive)
    done = run("drill", "--timeout=60", archive)
    assert done.returncode == 4
    text = done.stdout.decode()
    assert "configuration: the archive has none" in text
    assert "No bootable device" in text
