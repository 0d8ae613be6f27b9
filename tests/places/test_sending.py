# SPDX-License-Identifier: Apache-2.0
"""`vmapipe copy` and `vmapipe repack` into a service: the same contents there, or nothing of them."""

from __future__ import annotations

import functools
import gzip
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archiver.service.serving import Served, make_keys, serving
from tests.archives import CTIME_S, UUID, archive, in_order, manifest
from tests.machine import bad, end_of, good, next_event, run, started
from tests.network.cable import cable_to
from tests.network.place import lose_connections
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.crypt.keys import X25519Identity, encode_bech32
from vmapipe.places.ordering import DiskRun
from vmapipe.places.reading import SoundArchive
from vmapipe.places.sending import frames_of
from vmapipe.protocol import limits
from vmapipe.runtime.cancel import Cancel

MIB = 1 << 20


@functools.cache
def all_disks() -> dict[str, bytes]:
    return {
        "drive-scsi0": random.Random(1).randbytes(40 * CLUSTER_BYTES + 5000),
        "efidisk": bytes(3 * CLUSTER_BYTES),
        "drive-scsi1": bytes(300 * CLUSTER_BYTES) + random.Random(2).randbytes(77777),
        "vmstate": random.Random(3).randbytes(2 * CLUSTER_BYTES),
    }


CONFIGS = {"qemu-server.conf": b"name: web\n"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sending")
    server, clients = make_keys(folder, "host1")
    with serving(folder / "store", keys=(server, clients["host1"])) as served:
        yield served


def shuffled(seed: int) -> bytes:
    """An archive whose clusters came in any order; those of the memory in theirs."""
    order = in_order(all_disks())
    random.Random(seed).shuffle(order)
    memory = iter([each for each in in_order(all_disks()) if each.name == "vmstate"])
    order = [next(memory) if each.name == "vmstate" else each for each in order]
    return archive(all_disks(), CONFIGS, order=order, slots=20)


def keep(folder: Path, name: str, raw: bytes, *, vouched: bytes | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    if vouched is not None:
        (folder / f"{name}.manifest.json").write_bytes(manifest(vouched))
    return folder / name


def copied(*words: str | Path, code: int = 0, as_patched: bool = False) -> str:
    """What `vmapipe copy` says. In a process of its own: the library of sockets keeps a thread for large messages."""
    done = run("copy", *words, as_patched=as_patched)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == code, text
    assert "Traceback" not in text
    return text


def contents(path: Path) -> tuple[object, ...]:
    """What another reader of ours finds: names, sizes, configurations, time, uuid, and all blocks."""
    images = {name: bytearray(len(data)) for name, data in all_disks().items()}
    with closing(Cancel()) as cancel, SoundArchive(str(path), cancel) as sound:
        header = sound.archive.header
        names = {device.dev_id: device.name for device in header.devices}
        for found in sound.extents():
            for run in found.extent.runs:
                at, data = run.data_at, found.data or b""
                for index, mask in enumerate(run.masks if not run.is_zero else ()):
                    for bit in range(16):
                        if mask >> bit & 1:
                            start = (run.first_cluster + index) * CLUSTER_BYTES + bit * 4096
                            image = images[names[run.dev_id]]
                            image[start : start + 4096] = data[at : at + 4096]
                            at += 4096
    cut = {name: bytes(image[: len(all_disks()[name])]) for name, image in images.items()}
    return header.uuid, header.ctime_s, header.configs, [d.name for d in header.devices], cut


def test_what_a_service_stores_is_the_archive_whatever_its_order_and_compression(
    service: Served, tmp_path: Path
) -> None:
    raw = shuffled(7)
    source = tmp_path / "source"
    keep(source, "vm-2026-01-01.vma", raw, vouched=raw)
    keep(source, "vm-2026-01-02.vma.gz", gzip.compress(raw, 1))
    keep(source, "vm-1980-01-01.vma", b"none at all: it is passed over, because it is old")
    words = ("--newer-than", "1500w", "--only", "vm", "--speed", "500M", *service.link)
    told = copied(*words, source / "vm-2026-01-01.vma", service.endpoint)
    assert "sent 1 archives" in told
    assert "no manifest" not in told
    told = copied(*words, source / "vm-2026-01-02.vma.gz", service.endpoint)
    assert f"{service.endpoint}/vm-2026-01-02.vma.zst" in told
    assert "it has no manifest, so nothing says that it is whole" in told
    expected = contents(source / "vm-2026-01-01.vma")
    assert expected[0] == UUID
    assert expected[1] == CTIME_S
    assert expected[4] == all_disks()
    for name in ("vm-2026-01-01.vma", "vm-2026-01-02.vma.zst"):
        assert contents(service.folder / name) == expected
        good("verify", "--require-manifest", service.folder / name)
    # It is there: told, and passed over if that is asked for.
    again: tuple[str | Path, ...] = (*service.link, source / "vm-2026-01-01.vma", service.endpoint)
    assert "pass over it with --missing" in copied(*again, code=1)
    assert "sent 0 archives, 0 bytes; 1 were there" in copied("--missing", *again)
    # Another one after the first that is damaged goes there all the same.
    keep(source, "vm-2026-01-03.vma", raw, vouched=raw)
    told = copied("--missing", *service.link, source, service.endpoint, code=4)
    assert "something is wrong with 1 of 4 archives" in told
    assert (service.folder / "vm-2026-01-03.vma").exists()
    assert not (service.folder / "vm-1980-01-01.vma").exists()


def test_repacked_into_a_service_an_archive_is_changed_on_the_way(
    service: Served, tmp_path: Path
) -> None:
    raw = shuffled(8)
    path = keep(tmp_path, "vm.vma", raw, vouched=raw)
    renamed = tmp_path / "c"
    renamed.write_bytes(b"name: other\n")
    at = f"{service.endpoint}/repacked.vma.zst"
    told = good(
        *("repack", "--drop", "vmstate", "--rename", "efidisk=efidisk0", "--compress", "zstd:1"),
        *("--config", f"qemu-server.conf={renamed}", "--speed", "500M", *service.link),
        path,
        at,
    )
    assert f"stored as {at}" in told.decode()
    stored = service.folder / "repacked.vma.zst"
    good("verify", "--require-manifest", stored)
    assert good("config", stored) == b"name: other\n"
    good("restore", "--quiet", stored, tmp_path / "restored")
    disks = {each.name: each.read_bytes() for each in (tmp_path / "restored").glob("disk-*")}
    new_names = {"efidisk": "efidisk0"}
    assert disks == {
        f"disk-{new_names.get(name, name)}.raw": data
        for name, data in all_disks().items()
        if name != "vmstate"
    }
    bare = bad("repack", *service.link, path, service.endpoint, code=2)
    assert "goes the archive's name there" in bare
    told = bad("repack", "--reproducible", *service.link, path, at, code=2).encode()
    assert b"a service stores by its own rules" in told
    assert "are for a service" in bad("repack", *service.link, path, tmp_path / "x", code=2)


def test_of_a_source_that_is_damaged_or_changes_nothing_is_stored(
    service: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = shuffled(3)
    before = service.stored()
    flipped = bytearray(raw)
    flipped[-70_000] ^= 4
    missing = archive(all_disks(), CONFIGS, order=in_order(all_disks())[1:])
    for name, data in (("flipped", bytes(flipped)), ("cut", raw[:-9000]), ("missing", missing)):
        path = keep(
            tmp_path / "source", f"{name}.vma", data, vouched=None if name == "missing" else raw
        )
        told = copied(*service.link, path, service.endpoint, code=4)
        assert str(path) in told
        assert service.stored() == before
    # It is replaced while it is read: told at its end, before any device's.
    path = keep(tmp_path / "source", "changing.vma", raw)
    states = iter([("a",), ("b",)])
    monkeypatch.setattr("vmapipe.places.reading.source_state", lambda name: next(states))
    told = copied(*service.link, path, service.endpoint, code=1, as_patched=True)
    assert "was changed or replaced while it was read" in told
    assert service.stored() == before


def test_lost_connections_cost_nothing_and_a_service_that_dies_is_told(tmp_path: Path) -> None:
    raw = shuffled(5)
    path = keep(tmp_path / "source", "vm.vma", raw, vouched=raw)
    server, clients = make_keys(tmp_path, "host1")
    with (
        serving(tmp_path / "store", keys=(server, clients["host1"])) as served,
        cable_to(served.endpoint) as cable,
    ):
        cable.bytes_s = 4 * MIB
        words: tuple[str | Path, ...] = ("copy", "--json", *served.link, path, cable.endpoint)
        with started(*words) as copy:
            next_event(copy, "progress")
            lose_connections(cable, copy, MIB // 4)
            code, text = end_of(copy)
            assert code == 0, text
        assert contents(tmp_path / "store" / "vm.vma") == contents(path)
        for name in served.stored():
            (served.folder / name).unlink()
        cable.bytes_s = MIB
        with started(*words) as copy:
            next_event(copy, "progress")
            for process in served.archivers():
                process.kill()
            code, text = end_of(copy)
        assert code == 1
        assert "Traceback" not in text
        assert "the archiver at tcp://" in text
        assert psutil.pid_exists(served.process.pid)
        assert not [name for name in served.stored() if name.startswith("vm.vma")][1:]


def test_cancelled_it_leaves_nothing_there(service: Served, tmp_path: Path) -> None:
    raw = shuffled(6)
    path = keep(tmp_path, "cancelled.vma", raw)
    with started(
        "copy", "--json", "--speed", "300K", *service.link, path, service.endpoint
    ) as copy:
        next_event(copy, "progress")
        copy.terminate()
        code, text = end_of(copy)
    assert code == 143, text
    assert "cancelled by SIGTERM" in text
    assert not [name for name in service.stored() if name.startswith("cancelled")]


def test_what_a_service_decides_itself_is_refused_in_one_line(
    service: Served, tmp_path: Path
) -> None:
    raw = archive({"a": b"1" * CLUSTER_BYTES})
    path = keep(tmp_path / "source", "one.vma", raw)
    secret = bytes(range(32))
    to = X25519Identity(secret).recipient.text
    key = tmp_path / "key"
    key.write_text(encode_bech32("age-secret-key-", secret).upper())
    key.chmod(0o600)
    for words, text in (
        (("--encrypt-to", to), "a service encrypts what it stores"),
        (("--lock", "30d"), "a service locks what it stores"),
        (("--move",), "cannot be read back from here"),
    ):
        assert text in bad("copy", *words, *service.link, path, service.endpoint, code=2)
    assert "use --keys DIR" in bad("copy", path, service.endpoint, code=2)
    assert "are for a service" in bad("copy", "--keys", tmp_path, path, tmp_path, code=2)
    assert "nobody reads archives from one" in bad("copy", service.endpoint, tmp_path, code=2)
    (tmp_path / "hidden").mkdir()
    copied("--encrypt-to", to, path, tmp_path / "hidden")
    hidden: tuple[str | Path, ...] = (
        "copy",
        "--identity",
        key,
        *service.link,
        tmp_path / "hidden",
        service.endpoint,
    )
    assert "--decrypt sends it all the same" in bad(*hidden, code=2)
    assert "one.vma" not in service.stored()
    good(*hidden, "--decrypt")
    assert "one.vma" in service.stored()


@given(
    st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=60),
    st.integers(limits.MIN_FRAME_CHARGE, 5 << 20),
    st.integers(1, 1 << 22),
)
def test_a_run_is_cut_into_frames_that_the_credit_can_carry(
    masks: list[int], frame_bytes: int, zeroes: int
) -> None:
    data = memoryview(random.Random(1).randbytes(sum(m.bit_count() for m in masks) * 4096))
    words = b"".join(mask.to_bytes(2, "big") for mask in masks)
    run = DiskRun(1, 10, len(masks), words, data)
    for whole in (run, DiskRun(1, 10, zeroes, b"", memoryview(b""))):
        at, came, seen = 10, b"", b""
        for piece, part in frames_of(whole, frame_bytes):
            assert piece.first_cluster == at
            assert piece.length == len(part)
            assert limits.charge(piece.clusters, piece.length) <= frame_bytes
            at += piece.clusters
            came += part
            seen += piece.masks or bytes(2 * piece.clusters if whole is run else 0)
        assert at == 10 + whole.clusters
        assert came == bytes(whole.data)
        assert seen == whole.masks
