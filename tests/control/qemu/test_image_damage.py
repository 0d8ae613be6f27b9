# SPDX-License-Identifier: Apache-2.0
"""Images of a running QEMU that end before their data does are told of, and no others."""

from __future__ import annotations

import json
import os
import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.control.hosts.examined import examined
from tests.control.qemu.paused_machine import PausedMachine
from tests.control.qemu.storage_daemon import storage_daemon
from tests.machine import LIMIT_S, Need, good
from vmapipe.control.qemu.image_damage import TruncatedLook, UsedImage, find_truncated
from vmapipe.runtime.image_bounds import lost

MIB = 1 << 20


def make_qcow2(qemu_img: str, path: Path, data: bytes, *options: str) -> Path:
    raw = path.with_suffix(".raw")
    raw.write_bytes(data)
    words = [qemu_img, "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(path)]
    subprocess.run(words, check=True, timeout=LIMIT_S)
    return path


def test_a_truncated_image_below_a_running_machine_is_told_of_by_backup_and_doctor(
    tmp_path: Path, need: Need
) -> None:
    """Its guest reads zeroes there, and so does whoever restores the archive."""
    qemu, qemu_img = need("qemu-system-x86_64", "qemu-img")
    data = random.Random(7).randbytes(2 * MIB)
    cut = make_qcow2(qemu_img, tmp_path / "cut.qcow2", data)
    base = make_qcow2(qemu_img, tmp_path / "base.qcow2", data)
    well = make_qcow2(qemu_img, tmp_path / "well.qcow2", data)
    # The guest has written these bytes: they look like an image that has lost all, and are a disk's.
    raw = tmp_path / "raw.raw"
    raw.write_bytes(base.read_bytes()[:MIB])
    above = tmp_path / "above.qcow2"
    create = [qemu_img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(above)]
    subprocess.run(create, check=True, timeout=LIMIT_S)
    for image in (cut, base):
        os.truncate(image, image.stat().st_size - MIB)
    # A name as people have them; a comma in a -drive is written twice.
    odd = cut.rename(tmp_path / "its own\n'ä=,.qcow2")
    words = [qemu, "-S", "-display", "none", "-nodefaults", "-machine", "q35", "-accel", "tcg"]
    for number, (name, image) in enumerate(
        {"cut": odd, "above": above, "well": well, "raw": raw}.items()
    ):
        kind, path = image.suffix[1:], str(image).replace(",", ",,")
        words += ["-drive", f"if=none,id=d{number},format={kind},file={path}"]
        words += ["-device", f"virtio-blk,id={name},drive=d{number}"]
    with closing(PausedMachine(tmp_path, words)) as machine:
        events = good("backup", "--json", "--qmp", machine.qmp, tmp_path / "out.vma")
        found = examined("--qmp", machine.qmp)
    told = [e["text"] for e in map(json.loads, events.splitlines()) if e["event"] == "notice"]
    told = sorted(text for text in told if "truncated" in text)
    assert [text.partition(":")[0] for text in told] == ["disk 'drive-above'", "disk 'drive-cut'"]
    assert f"the image '{base}', which QEMU has open, is truncated: its file has" in told[0]
    assert "are lost: the guest reads zeroes there" in told[0]
    assert "its own\\n" in told[1]
    assert "\n" not in told[1]
    findings = [f for f in found["findings"] if f["topic"] == "images"]
    assert sorted(f["text"] for f in findings) == told
    assert {f["verdict"] for f in findings} == {"warning"}


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=512"), ("-o", "extended_l2=on")])
def test_an_image_that_grows_while_it_is_looked_at_is_never_called_truncated(
    tmp_path: Path, need: Need, options: tuple[str, ...]
) -> None:
    qemu_img, nbdcopy, _ = need("qemu-img", "nbdcopy", "qemu-storage-daemon")
    source = tmp_path / "source.raw"
    source.write_bytes(
        random.Random(3).randbytes(MIB) * (4 if "cluster_size=512" in options else 32)
    )
    image = tmp_path / "growing.qcow2"
    create = [qemu_img, "create", "-q", "-f", "qcow2", *options, str(image)]
    create += [str(source.stat().st_size)]
    subprocess.run(create, check=True, timeout=LIMIT_S)
    looks = 0
    with storage_daemon(tmp_path, growing=image) as machine, image.open("rb") as file:
        uri = f"nbd+unix:///growing?socket={machine.path}"
        with subprocess.Popen([nbdcopy, "--flush", str(source), uri]) as writer:
            while writer.poll() is None:
                # One look alone; a judgement needs several that agree.
                assert (
                    lost(
                        "qcow2",
                        lambda offset, length: os.pread(file.fileno(), length, offset),
                        lambda: os.fstat(file.fileno()).st_size,
                    )
                    is None
                )
                looks += 1
        assert writer.returncode == 0
        pid = machine.process.pid
        assert not list(find_truncated([UsedImage("d", "qcow2", str(image))], pid, lambda: None))
    assert looks


def test_a_look_ends_with_its_backup(tmp_path: Path) -> None:
    """Also where it is not asked again, or has not begun."""
    notices: list[str] = []
    look = TruncatedLook()
    look.expect([UsedImage("d", "qcow2", str(tmp_path / "none"))])
    look.poll(os.getpid(), notices)
    look.end(notices, stored=True)
    look.end(notices, stored=True)
    look.poll(os.getpid(), notices)
    assert not notices
