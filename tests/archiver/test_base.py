# SPDX-License-Identifier: Apache-2.0
"""Archives that are made of a base and of what has changed, by a real archiver and a producer that knows."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from tests.archiver.job.world import read_images
from tests.machine import (
    LIMIT_S,
    VMAPIPE,
    bad,
    children,
    eventually,
    good,
    make_disk,
    next_event,
    run,
    started,
    without_limit,
)
from vmapipe.archiver.base.check import Base, check_base
from vmapipe.archiver.base.choice import choose_base
from vmapipe.clusters.masks import cluster_masks, collect
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.transfer import Abort, Done, Refuse
from vmapipe.protocol.transfer_state import ProducerSide, ProducerState
from vmapipe.vma.header import HEADER_BYTES

JOB = bytes(range(16))
PATTERN = "Ap0hA" * 60


def clusters_of(data: bytes) -> list[bytes]:
    return [data[at : at + CLUSTER_BYTES] for at in range(0, len(data), CLUSTER_BYTES)]


def change(disk: Path, *numbers: int, seed: int = 7) -> set[int]:
    """Write other data to these clusters; their numbers."""
    chance = random.Random(seed)
    with disk.open("r+b") as file:
        for number in numbers:
            file.seek(number * CLUSTER_BYTES + 4096)
            file.write(chance.randbytes(5000))
    return set(numbers)


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


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)


@pytest.fixture
def base(disk: Path, tmp_path: Path) -> Path:
    good("backup", "--disk", f"a={disk}", tmp_path / "vm-2026-01-01.vma")
    return tmp_path / "vm-2026-01-01.vma"


def restored(archive: Path, folder: Path) -> bytes:
    good("verify", archive)
    good("restore", archive, folder)
    return (folder / "disk-a.raw").read_bytes()


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


# --- disks at rest: what has changed is found by digests ---


def incremental(disk: Path, new: Path, *more: str | Path) -> dict[str, dict[str, Any]]:
    """Back up with `--base auto`; the last event of each name."""
    out = good("backup", "--json", "--base", "auto", *more, "--disk", f"a={disk}", new)
    return {event["event"]: event for event in map(json.loads, out.splitlines())}


def test_of_a_disk_at_rest_little_more_than_what_has_changed_is_sent(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)
    first = incremental(disk, tmp_path / "vm-2026-01-01.vma")
    assert not first["base"]["devices"][0]["incremental"]
    changed = change(disk, 0, 1, 58, 120, 299 - 4)
    with disk.open("r+b") as file:  # one that becomes zero
        file.seek(5 * CLUSTER_BYTES)
        file.write(bytes(CLUSTER_BYTES))
    for day, clusters in ((2, len(changed)), (3, 0)):
        told = incremental(disk, tmp_path / f"vm-2026-01-0{day}.vma")
        assert told["base"]["devices"] == [{"name": "a", "incremental": True, "reason": ""}]
        assert told["base"]["archive"] == str(tmp_path / f"vm-2026-01-0{day - 1}.vma")
        assert told["transfer"]["sent_bytes"] <= 1.1 * clusters * CLUSTER_BYTES
    assert restored(tmp_path / "vm-2026-01-03.vma", tmp_path / "out") == disk.read_bytes()


def test_digests_that_are_damaged_or_lost_cost_time_and_nothing_else(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    digests = tmp_path / "vm-2026-01-01.vma.digests"
    raw = bytearray(digests.read_bytes())
    change(disk, 3)
    damages = {"1": raw[:-1], "2": b"", "3": bytes(len(raw)), "4": None}
    raw[4096 : 4096 + 16 * 20] = random.Random(3).randbytes(16 * 20)
    damages["5"] = raw
    for name, content in damages.items():
        digests.unlink(missing_ok=True)
        if content is not None:
            digests.write_bytes(content)
        words = ("--base", tmp_path / "vm-2026-01-01.vma", "--disk", f"a={disk}")
        good("backup", *words, tmp_path / f"new{name}.vma")
        out = tmp_path / f"out{name}"
        assert restored(tmp_path / f"new{name}.vma", out) == disk.read_bytes()


def test_several_disks_of_which_one_is_new(tmp_path: Path) -> None:
    a = make_disk(tmp_path / "a", PATTERN)
    b = make_disk(tmp_path / "b", "A0p" * 30, seed=2)
    incremental(a, tmp_path / "vm-2026-01-01.vma")
    change(a, 7)
    told = incremental(a, tmp_path / "vm-2026-01-02.vma", "--disk", f"0={b}")
    reasons = {device["name"]: device["reason"] for device in told["base"]["devices"]}
    assert reasons["a"] == ""
    assert "does not have this device" in reasons["0"]
    good("verify", tmp_path / "vm-2026-01-02.vma")
    change(b, 4)
    told = incremental(a, tmp_path / "vm-2026-01-03.vma", "--disk", f"0={b}")
    assert all(device["incremental"] for device in told["base"]["devices"])
    good("verify", tmp_path / "vm-2026-01-03.vma")
    good("restore", tmp_path / "vm-2026-01-03.vma", tmp_path / "out")
    assert (tmp_path / "out" / "disk-a.raw").read_bytes() == a.read_bytes()
    assert (tmp_path / "out" / "disk-0.raw").read_bytes() == b.read_bytes()


def test_a_disk_of_zeroes_that_takes_anothers_number_does_not_take_its_digests(
    tmp_path: Path,
) -> None:
    a, b = (make_disk(tmp_path / name, "A" * 9, seed=seed) for seed, name in enumerate("ab"))
    empty = make_disk(tmp_path / "c", "h" * 9)
    archives = [tmp_path / f"vm-2026-01-0{day}.vma" for day in (1, 2, 3)]
    incremental(a, archives[0], "--disk", f"b={b}")
    told = incremental(a, archives[1], "--disk", f"c={empty}")
    assert [device["incremental"] for device in told["base"]["devices"]] == [False, True]
    # The data that had that number: nothing of it is in the base.
    words = ("--json", "--base", "auto", "--disk", f"c={b}", "--disk", f"a={a}", archives[2])
    events = [json.loads(line) for line in good("backup", *words).splitlines()]
    (base,) = [event for event in events if event["event"] == "base"]
    assert [device["incremental"] for device in base["devices"]] == [True, True]
    sent = {e["device"]: e["sent_bytes"] for e in events if e["event"] == "transfer"}
    assert sent == {"a": 0, "c": b.stat().st_size}
    disks = read_images(archives[2].read_bytes())
    assert disks == {"a": a.read_bytes(), "c": b.read_bytes()}


def test_damage_in_the_base_makes_a_full_backup_by_itself_and_says_so(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    with (tmp_path / "vm-2026-01-01.vma").open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"damage")
    told = incremental(disk, tmp_path / "vm-2026-01-02.vma")
    assert "This is a full backup instead" in told["notice"]["text"]
    assert "at offset" in told["notice"]["text"]
    assert restored(tmp_path / "vm-2026-01-02.vma", tmp_path / "out") == disk.read_bytes()


@pytest.mark.parametrize("victim", ["vmapipe.archiver.main", "vmapipe.producer.main", ""])
def test_a_kill_in_the_middle_leaves_nothing_and_the_base_as_it_was(
    tmp_path: Path, victim: str
) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    before = {path.name for path in tmp_path.iterdir()}
    change(disk, *range(0, 300, 2))
    new = tmp_path / "vm-2026-01-02.vma"
    words = ("backup", "--json", "--speed", "1M", "--base", "auto", "--disk", f"a={disk}", new)
    with started(*words) as process:
        next_event(process, "progress")
        for child in children(process, victim) if victim else [psutil.Process(process.pid)]:
            child.kill()
        process.wait(LIMIT_S)
    assert eventually(lambda: {path.name for path in tmp_path.iterdir()} == before)
    incremental(disk, new)
    assert restored(new, tmp_path / "out") == disk.read_bytes()


def test_a_base_that_vanishes_in_the_middle_is_used_to_its_end(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    new = tmp_path / "vm-2026-01-02.vma"
    words = ("backup", "--json", "--speed", "1M", "--base", "auto", "--disk", f"a={disk}", new)
    with started(*words) as process:
        next_event(process, "progress")
        for path in tmp_path.glob("vm-2026-01-01*"):
            path.unlink()
        without_limit(process)
        _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, said
    assert restored(new, tmp_path / "out") == disk.read_bytes()


def test_a_base_may_lie_on_another_file_system(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)
    first = tmp_path / "vm-2026-01-01.vma"
    incremental(disk, first)
    change(disk, 3)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        assert os.stat(there).st_dev != tmp_path.stat().st_dev, "one file system"
        new = Path(there) / "vm-2026-01-02.vma"
        good("backup", "--base", first, "--disk", f"a={disk}", new)
        assert restored(new, tmp_path / "out") == disk.read_bytes()
        # The digests came over, too: nothing but them would tell what is unchanged.
        told = incremental(disk, Path(there) / "vm-2026-01-03.vma")
        assert told["transfer"]["sent_bytes"] == 0


def test_two_backups_with_one_base_at_once_both_end_well(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    change(disk, 9)
    words = ("backup", "--base", tmp_path / "vm-2026-01-01.vma", "--disk", f"a={disk}")
    with started(*words, tmp_path / "x.vma") as one, started(*words, tmp_path / "y.vma") as other:
        for process in (one, other):
            _, said = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, said
    for name in ("x", "y"):
        assert restored(tmp_path / f"{name}.vma", tmp_path / name) == disk.read_bytes()


def test_an_archive_that_cannot_be_a_base_says_so_when_it_is_made(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A")
    first = tmp_path / "vm-2026-01-01.vma"
    told = incremental(disk, first, "--manifest", tmp_path / "elsewhere.json")
    assert "cannot be the base of a later one" in told["notice"]["text"]
    told = incremental(disk, tmp_path / "vm-2026-01-02.vma")
    assert "no manifest" in told["base"]["devices"][0]["reason"]
    for word, value in (("--full-every", "3"), ("--sample", "2")):
        said = bad("backup", word, value, "--disk", f"a={disk}", tmp_path / "x.vma", code=2)
        assert f"{word} says something of --base" in said


def test_a_disk_that_is_full_before_all_is_taken_from_the_base_leaves_the_base_alone(
    tmp_path: Path,
) -> None:
    if os.geteuid():
        pytest.skip("mounting needs root")
    disk = make_disk(tmp_path / "disk", "A" * 150)
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=15M", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        first, new = folder / "vm-2026-01-01.vma", folder / "vm-2026-01-02.vma"
        incremental(disk, first)
        before = sorted(path.name for path in folder.iterdir())
        change(disk, 3)
        said = bad("backup", "--base", "auto", "--disk", f"a={disk}", new)
        assert "No space left on device" in said
        assert "free space or choose another folder" in said
        assert sorted(path.name for path in folder.iterdir()) == before
        good("verify", first)
    finally:
        subprocess.run(["umount", folder], check=True, timeout=LIMIT_S)


# --- file systems on which files share blocks ---


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(
    request: pytest.FixtureRequest, tmp_path: Path, need: Callable[..., list[str]]
) -> Iterator[Path]:
    """A folder on a file system in which files can share blocks."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    (mkfs,) = need(f"mkfs.{request.param}")
    image, folder = tmp_path / "image", tmp_path / "fs"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([mkfs, "-q", image], check=True, capture_output=True, timeout=LIMIT_S)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=LIMIT_S)


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_where_blocks_can_be_shared_an_archive_takes_what_has_changed(
    sharing: Path, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 1000)
    config = tmp_path / "config"
    config.write_text("x")
    incremental(disk, sharing / "vm-2026-01-01.vma")
    changed = change(disk, 5, 444, 900, 901)
    for day, clusters, text in ((2, len(changed), "x"), (3, 0, "y" * 3000)):
        # The second one's header is longer: what follows is brought into phase again.
        config.write_text(text)
        before = used_bytes(sharing)
        told = incremental(disk, sharing / f"vm-2026-01-0{day}.vma", "--config", config)
        extents = 1000 // 58 + 1
        # A block for each extent's header, the archive's own, and what lies beside it.
        besides = extents * 4096 + 300 * 1024
        assert used_bytes(sharing) - before <= 1.05 * clusters * CLUSTER_BYTES + besides
        assert (
            told["stored"]["shared_bytes"] > (999 - clusters) * CLUSTER_BYTES - 3 * extents * 4096
        )
        out = tmp_path / str(day)
        assert restored(sharing / f"vm-2026-01-0{day}.vma", out) == disk.read_bytes()
