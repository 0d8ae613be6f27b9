# SPDX-License-Identifier: Apache-2.0
"""Archives that are made of a base and of what has changed, by a real archiver and a producer that knows."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from tests.archiver.changing import change, restored
from tests.machine import LIMIT_S, VMAPIPE, bad, good, run
from vmapipe.archiver.base.check import Base, check_base
from vmapipe.archiver.base.choice import choose_base
from vmapipe.clusters.masks import cluster_masks, collect
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.transfer import Abort, Done, Refuse
from vmapipe.protocol.transfer_state import ProducerSide, ProducerState
from vmapipe.vma.header import HEADER_BYTES

JOB = bytes(range(16))


def clusters_of(data: bytes) -> list[bytes]:
    return [data[at : at + CLUSTER_BYTES] for at in range(0, len(data), CLUSTER_BYTES)]


@contextmanager
def archiver(
    folder: Path, output: Path, base: Path, *more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """An archiver of one device `a` on `folder/sock`."""
    words = ["archiver", "--listen", f"ipc://{folder}/sock", "--device", "a", "--job", JOB.hex()]
    process = subprocess.Popen(
        [*VMAPIPE, *words, "--output", str(output), "--base", str(base), *more],
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def send(folder: Path, disk: Path, changed: set[int], order: list[int] | None = None) -> str:
    """Be a producer that knows what has changed; the archiver's last word."""
    clusters = clusters_of(disk.read_bytes())
    side = ProducerSide(JOB, "a", disk.stat().st_size)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"ipc://{folder}/sock")
        socket.setsockopt(zmq.LINGER, 1000)
        socket.send_multipart(side.hello())
        said: list[object] = []

        def hear() -> None:
            assert socket.poll(int(LIMIT_S * 1000)), "the archiver is silent"
            said.append(side.receive(socket.recv_multipart()))

        while side.state is ProducerState.GREETING:
            hear()
        for number in order or range(len(clusters)):
            while side.state is ProducerState.SENDING and side.credit < 70_000:
                hear()
            if side.state is not ProducerState.SENDING:
                break
            if side.has_base and number not in changed:
                socket.send_multipart(side.unchanged(number, 1))
                continue
            data = clusters[number] + bytes(-len(clusters[number]) % 4096)
            masks = cluster_masks(data, len(data))
            payload = collect(data, masks) if masks else b""
            socket.send_multipart(side.run(number, 1, masks, payload))
        if side.state is ProducerState.SENDING:
            socket.send_multipart(side.end())
        while side.state is not ProducerState.CLOSED:
            hear()
        match said[-1]:
            case Done():
                return ""
            case Refuse(_, reason) | Abort(reason):
                return reason
        raise AssertionError(said[-1])


def test_the_archive_equals_the_disk(disk: Path, base: Path, tmp_path: Path) -> None:
    changed = change(disk, 0, 1, 2, 59, 120, 298)
    with archiver(tmp_path, tmp_path / "new.vma", base):
        assert send(tmp_path, disk, changed) == ""
    assert restored(tmp_path / "new.vma", tmp_path / "out") == disk.read_bytes()


def test_so_it_does_when_all_comes_in_any_order(disk: Path, base: Path, tmp_path: Path) -> None:
    changed = change(disk, *range(0, 300, 7))
    order = list(range(300))
    random.Random(1).shuffle(order)
    with archiver(tmp_path, tmp_path / "new.vma", base, "--compress", "zstd"):
        assert send(tmp_path, disk, changed, order) == ""
    assert restored(tmp_path / "new.vma", tmp_path / "out") == disk.read_bytes()


def test_a_producer_that_knows_nothing_of_bases_makes_the_same_archive(
    disk: Path, base: Path, tmp_path: Path
) -> None:
    change(disk, 5)
    with archiver(tmp_path, tmp_path / "new.vma", base):
        assert send(tmp_path, disk, set(range(300))) == ""
    assert restored(tmp_path / "new.vma", tmp_path / "out") == disk.read_bytes()


@pytest.mark.parametrize("at", [100, HEADER_BYTES + 600, HEADER_BYTES + 3_000_000, -100])
def test_a_base_that_is_damaged_anywhere_makes_no_archive(
    disk: Path, base: Path, tmp_path: Path, at: int
) -> None:
    with base.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with archiver(tmp_path, tmp_path / "new.vma", base) as process:
        reason = send(tmp_path, disk, {0})
        if at == 100:  # its header: seen before anything begins, and all is sent
            assert reason == ""
            return
        assert process.wait(LIMIT_S) == 1
    assert f"the base {base} at offset" in reason
    assert "'a'" in reason
    assert "--base none" in reason
    assert not (tmp_path / "new.vma").exists()
    assert not list(tmp_path.glob("new*"))


def doubt(archive: Path) -> str:
    found = check_base(str(archive))
    assert isinstance(found, str), "no doubt about it"
    return found


def test_a_good_base_is_told_with_its_devices(base: Path) -> None:
    found = check_base(str(base))
    assert isinstance(found, Base)
    assert [(d.name, d.size_bytes) for d in found.devices] == [("a", 299 * CLUSTER_BYTES + 5000)]


def test_each_doubt_about_a_base_is_told(base: Path, tmp_path: Path) -> None:
    manifest = Path(f"{base}.manifest.json")
    assert "does not exist" in doubt(tmp_path / "nothing.vma")
    text = manifest.read_text()
    manifest.unlink()
    assert "no manifest" in doubt(base)
    manifest.write_text(text.replace('"clusters": 300', '"clusters": 299'))
    assert "is not complete: 299 of 300" in doubt(base)
    manifest.write_text(text[:-40])
    assert "manifest is damaged" in doubt(base)
    manifest.write_text("")
    assert "manifest is damaged" in doubt(base)
    uuid = text.split('"uuid": "')[1][:32]
    manifest.write_text(text.replace(uuid, "0" * 32))
    assert "another archive's" in doubt(base)
    manifest.write_text(text)
    assert isinstance(check_base(str(base)), Base)
    raw = base.read_bytes()
    base.write_bytes(raw[:-1])
    assert "where its manifest says" in doubt(base)
    base.write_bytes(raw[:33] + b"\xff" + raw[34:])
    assert "checksum is wrong" in doubt(base)
    base.unlink()
    os.mkfifo(base)
    assert "it is a FIFO" in doubt(base)


def test_auto_takes_the_newest_of_the_machine_that_stands_the_check(
    base: Path, disk: Path, tmp_path: Path
) -> None:
    new = str(tmp_path / "vm-2026-02-01.vma")

    def chosen() -> str:
        found = choose_base(new, ["a"])
        return found.archive if isinstance(found, Base) else found

    def copy(name: str) -> Path:
        for suffix in ("", ".manifest.json"):
            shutil.copy(f"{base}{suffix}", tmp_path / f"{name}{suffix}")
        return tmp_path / name

    assert chosen() == str(base)
    newer = copy("vm-2026-01-31.vma")
    copy("other-2026-01-31.vma")
    assert chosen() == str(newer)
    newer.write_bytes(newer.read_bytes()[:-5])
    assert chosen() == str(base)
    assert "none of these disks" in str(choose_base(new, ["b"])) or "where its manifest" in str(
        choose_base(new, ["b"])
    )
    assert "has no date" in str(choose_base(str(tmp_path / "vm.vma"), ["a"]))
    assert "no earlier archive of db" in str(
        choose_base(str(tmp_path / "db-2026-02-01.vma"), ["a"])
    )


def test_a_disk_of_another_size_is_sent_in_full_and_the_reason_told(
    disk: Path, base: Path, tmp_path: Path
) -> None:
    with disk.open("r+b") as file:
        file.truncate(310 * CLUSTER_BYTES)
    words = ("backup", "--json", "--base", base, "--disk", f"a={disk}", tmp_path / "new.vma")
    assert b"its size was" in good(*words)
    assert restored(tmp_path / "new.vma", tmp_path / "out") == disk.read_bytes()


def test_a_backup_whose_base_is_damaged_becomes_a_full_one_by_itself(
    disk: Path, base: Path, tmp_path: Path
) -> None:
    with base.open("r+b") as file:
        file.seek(HEADER_BYTES + 600)
        file.write(b"damage")
    done = run("backup", "--base", base, "--disk", f"a={disk}", tmp_path / "new.vma")
    assert done.returncode == 0
    said = (done.stdout + done.stderr).decode()
    assert restored(tmp_path / "new.vma", tmp_path / "out") == disk.read_bytes()
    assert "full backup" in said or b"damage" not in base.read_bytes()


def test_the_base_option_excludes_what_it_cannot_do(disk: Path, base: Path, tmp_path: Path) -> None:
    words = ("--base", base, "--disk", f"a={disk}", tmp_path / "new.vma")
    assert "--reproducible" in bad("backup", "--reproducible", *words, code=2)
    assert "--base is empty" in bad("backup", *words, "--base", "", code=2)
