# SPDX-License-Identifier: Apache-2.0
"""Disks into an archive and back, through the commands."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMAPIPE, Need, bad, good, make_disk, run, sha256, started
from tests.vma.archives import disk_image, read_whole, scan

# A letter a cluster (tests/machine.py), and the bytes of the last one.
SHAPES = {
    "dense": ("A" * 130, 65536),
    "sparse": ("hhhAhhhhhhhhhhhhhhhhhhpphhhh" * 5, 65536),
    "odd": ("Ap0hA", 70_001 - 65536),
    "zero": ("0" * 70, 512),
    "hole": ("h" * 200, 1),
    "one-byte": ("p", 7 * 4096 + 6),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("disks")
    return {
        name: make_disk(folder / f"{name}.raw", pattern, tail, seed=index)
        for index, (name, (pattern, tail)) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "qemu-server.conf"
    path.write_text("boot: order=scsi0\nname: test\n")
    return path


def backup(disks: dict[str, Path], *more: str | Path, **options: object) -> bytes:
    words = [word for name, path in disks.items() for word in ("--disk", f"{name}={path}")]
    return good("backup", "--quiet", *words, *more, **options)


@pytest.fixture(scope="module")
def archive(disks: dict[str, Path], config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "vm.vma"
    backup(disks, "--config", config, "--config", f"other={config}", path)
    return path


def same_disks(disks: dict[str, Path], folder: Path) -> None:
    for name, path in disks.items():
        assert sha256(folder / f"disk-{name}.raw") == sha256(path), name


def test_disks_of_every_shape_and_two_configs_come_back_as_they_were(
    archive: Path, disks: dict[str, Path], config: Path, tmp_path: Path
) -> None:
    good("verify", archive)
    good("restore", archive, tmp_path / "out")
    same_disks(disks, tmp_path / "out")
    assert (tmp_path / "out" / "qemu-server.conf").read_bytes() == config.read_bytes()
    assert (tmp_path / "out" / "other").read_bytes() == config.read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == len(disks) + 2


def test_an_independent_reader_finds_the_same_disks(archive: Path, disks: dict[str, Path]) -> None:
    from dissect.archive.vma import VMA

    with archive.open("rb") as file:
        vma = VMA(file)
        found = {device.name: device for device in vma.devices()}
        assert set(found) == set(disks)
        for name, path in disks.items():
            data = found[name].open().read()
            assert data[: path.stat().st_size] == path.read_bytes(), name
            assert not any(data[path.stat().st_size :]), name


def test_a_hole_costs_no_reading_and_no_room_and_stays_a_hole(
    archive: Path, disks: dict[str, Path], tmp_path: Path
) -> None:
    good("restore", "--device", "hole", archive, tmp_path / "out")
    assert (tmp_path / "out" / "disk-hole.raw").stat().st_blocks == 0


@pytest.mark.parametrize("level", ["zstd", "zstd:1", "zstd:9"])
def test_a_compressed_archive_comes_back_from_a_file_and_from_a_pipe(
    disks: dict[str, Path], need: Need, tmp_path: Path, level: str
) -> None:
    (zstd,) = need("zstd")
    packed = tmp_path / "vm.vma.zst"
    backup(disks, "--compress", level, packed)
    assert packed.stat().st_size < sum(path.stat().st_size for path in disks.values()) / 2
    good("verify", "--whole-file", packed)
    good("restore", packed, tmp_path / "file")
    same_disks(disks, tmp_path / "file")
    with packed.open("rb") as stdin:
        good("restore", "-", tmp_path / "pipe", stdin=stdin)
    same_disks(disks, tmp_path / "pipe")
    plain = subprocess.run([zstd, "-q", "-d", "-c", packed], capture_output=True, check=True).stdout
    read_whole(plain)


def test_an_archive_comes_back_from_a_pipe_a_command_and_gzip(
    archive: Path, disks: dict[str, Path], tmp_path: Path
) -> None:
    cat = subprocess.Popen(["cat", archive], stdout=subprocess.PIPE)
    good("restore", "-", tmp_path / "pipe", stdin=cat.stdout)
    assert cat.stdout is not None
    cat.stdout.close()
    assert cat.wait(LIMIT_S) == 0
    same_disks(disks, tmp_path / "pipe")
    good("restore", f"exec:cat '{archive}'", tmp_path / "command")
    same_disks(disks, tmp_path / "command")
    packed = tmp_path / "vm.vma.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes(), 1))
    good("restore", packed, tmp_path / "gzip")
    same_disks(disks, tmp_path / "gzip")


def image_of(raw: bytes, name: str) -> bytes:
    device = next(d for d in read_whole(raw).devices if d.name == name)
    return disk_image(device, scan(raw))


@pytest.mark.parametrize("target", ["-", "fd:1", "exec:cat >&3", "FIFO"])
def test_an_archive_goes_down_a_pipe_of_any_kind_and_every_word_goes_to_stderr(
    disks: dict[str, Path], tmp_path: Path, target: str
) -> None:
    disk = disks["odd"]
    out = tmp_path / "out.vma"
    fifo = tmp_path / "fifo"
    words = ["backup", "--disk", f"odd={disk}"]
    match target:
        case "FIFO":
            os.mkfifo(fifo)
            with subprocess.Popen(["cp", fifo, out]) as reader:
                done = run(*words, fifo)
                assert reader.wait(LIMIT_S) == 0
        case "exec:cat >&3":
            done = run(*words, f"exec:cat >{out}")
        case _:
            with out.open("wb") as stdout:
                done = run(*words, target, stdout=stdout, stderr=subprocess.PIPE)
            assert b"backup done" in done.stderr
    assert done.returncode == 0, done.stderr
    assert image_of(out.read_bytes(), "odd") == disk.read_bytes()
    assert not (tmp_path / "out.vma.manifest.json").exists()


def test_an_inherited_descriptor_takes_the_archive(disks: dict[str, Path], tmp_path: Path) -> None:
    for spec in ("fd:{}", "/dev/fdset/{}"):
        out = tmp_path / f"{spec[:2].strip('/')}.vma"
        with out.open("wb") as file:
            backup({"odd": disks["odd"]}, spec.format(file.fileno()), pass_fds=[file.fileno()])
        assert image_of(out.read_bytes(), "odd") == disks["odd"].read_bytes()


def test_a_character_device_takes_the_archive(disks: dict[str, Path]) -> None:
    backup({"odd": disks["odd"]}, "/dev/null")


def test_two_reproducible_backups_are_the_same_bytes(
    disks: dict[str, Path], config: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1353949200"}
    for name in ("one.vma", "two.vma"):
        backup(disks, "--reproducible", "--config", config, tmp_path / name, env=environment)
    one, two = (tmp_path / name for name in ("one.vma", "two.vma"))
    assert sha256(one) == sha256(two)
    manifests = [
        (tmp_path / f"{name}.manifest.json").read_bytes() for name in ("one.vma", "two.vma")
    ]
    assert manifests[0] == manifests[1]
    assert json.loads(good("list", "--json", one))["ctime"] == 1353949200


@pytest.mark.parametrize("name", ["g06-c58", "g06-c59", "g06-c60", "g01-rfc", "g08-tail"])
def test_one_disk_with_the_same_uuid_and_time_has_the_extents_of_the_reference(
    golden: Path, tmp_path: Path, name: str
) -> None:
    reference = golden / f"{name}.vma"
    listing = json.loads(good("list", "--json", reference))
    (device,) = listing["devices"]
    good("restore", "--quiet", reference, tmp_path / "disks")
    ours = tmp_path / "ours.vma"
    disk = tmp_path / "disks" / f"disk-{device['name']}.raw"
    backup(
        {device["name"]: disk},
        *("--uuid", listing["uuid"], "--reproducible", ours),
        env={**os.environ, "SOURCE_DATE_EPOCH": str(listing["ctime"])},
    )
    assert ours.read_bytes() == reference.read_bytes()


def test_json_events_tell_the_whole_job_and_progress_reaches_the_end(
    disks: dict[str, Path], tmp_path: Path
) -> None:
    out = good("backup", "--json", "--disk", f"a={disks['sparse']}", tmp_path / "vm.vma")
    events = [json.loads(line) for line in out.splitlines()]
    names = [event["event"] for event in events]
    assert names[-1] == "done"
    assert {"listening", "begun", "reading", "progress", "stored", "sent"} <= set(names)
    (device,) = [e for e in events if e["event"] == "progress"][-1]["devices"]
    size = disks["sparse"].stat().st_size
    assert device["done_bytes"] == device["bytes"] == size
    # 5 full clusters and 10 blocks are not zero.
    assert size - device["zero_bytes"] == 5 * 65536 + 10 * 4096


def test_the_manifest_of_a_piped_archive_comes_with_the_events(
    disks: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "vm.vma"
    with out.open("wb") as stdout:
        done = run(
            *("backup", "--json", "--disk", f"a={disks['odd']}", "-"),
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 0
    events = [json.loads(line) for line in done.stderr.splitlines()]
    manifest = tmp_path / "manifest.json"
    manifest.write_text("".join(e["text"] for e in events if e["event"] == "manifest"))
    text = good("verify", "--manifest", manifest, out).decode()
    assert "every byte of data" in text


def test_the_program_xxhsum_prints_the_digest_of_the_manifest(archive: Path, need: Need) -> None:
    (xxhsum,) = need("xxhsum")
    printed = subprocess.run([xxhsum, "-H2", archive], capture_output=True, check=True).stdout
    manifest = json.loads(archive.with_name("vm.vma.manifest.json").read_text())
    assert printed.split()[0].decode() == manifest["file"]["digest"]


def test_processes_started_by_hand_make_the_same_archive(
    disks: dict[str, Path], tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path / 'socket'}"
    with started(
        *("archiver", "--listen", endpoint, "--expect", "2", "--output", tmp_path / "vm.vma")
    ) as archiver:
        producers = [
            subprocess.Popen(
                [*VMAPIPE, "producer", "--archiver", endpoint, "--disk", f"{name}={disks[name]}"],
                stderr=subprocess.PIPE,
            )
            for name in ("odd", "sparse")
        ]
        for producer in producers:
            _, text = producer.communicate(timeout=LIMIT_S)
            assert producer.returncode == 0, text
        assert archiver.wait(LIMIT_S) == 0
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    same_disks({name: disks[name] for name in ("odd", "sparse")}, tmp_path / "out")


def test_the_producer_in_the_docs_feeds_the_real_archiver(
    disks: dict[str, Path], tmp_path: Path
) -> None:
    endpoint, job = f"ipc://{tmp_path / 'socket'}", "00112233445566778899aabbccddeeff"
    script = Path(__file__).parents[2] / "docs" / "examples" / "foreign_producer.py"
    for name in ("odd", "sparse", "one-byte"):
        archive = tmp_path / f"{name}.vma"
        with started(
            "archiver", "--listen", endpoint, "--job", job, "--device", name, "--output", archive
        ) as archiver:
            done = subprocess.run(
                [sys.executable, script, endpoint, job, name, disks[name]],
                capture_output=True,
                timeout=LIMIT_S,
            )
            assert done.returncode == 0, done.stderr
            assert archiver.wait(LIMIT_S) == 0
        assert image_of(archive.read_bytes(), name) == disks[name].read_bytes()


def test_over_tcp_the_data_travels_in_the_frames(disks: dict[str, Path], tmp_path: Path) -> None:
    plain = "--insecure-plain-tcp"
    with started(
        *("archiver", plain, "--listen", "tcp://127.0.0.1:*", "--expect", "1"),
        *("--output", tmp_path / "vm.vma"),
    ) as archiver:
        assert archiver.stderr is not None
        endpoint = archiver.stderr.readline().decode().split()[-1]
        disk = f"dense={disks['dense']}"
        done = run("producer", plain, "--archiver", endpoint, "--disk", disk)
        assert done.returncode == 0, done.stderr
        assert archiver.wait(LIMIT_S) == 0
    assert image_of((tmp_path / "vm.vma").read_bytes(), "dense") == disks["dense"].read_bytes()


def test_a_device_is_restored_onto_an_existing_target_over_its_old_data(
    archive: Path, disks: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * disks["sparse"].stat().st_size)
    good("restore", "--device", f"sparse={target}", "--no-configs", archive, tmp_path / "out")
    assert sha256(target) == sha256(disks["sparse"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["-x", "--json", "a b", "Übung,1", "it's"])
def test_odd_but_legal_names_and_paths_come_back(tmp_path: Path, name: str) -> None:
    disk = make_disk(tmp_path / f"{name}=x,y", "Ap")
    for index, words in enumerate((f"--disk={name}={disk}", f"--disk={disk}")):
        archive = tmp_path / f"{index}.vma"
        good("backup", words, f"--config={name}={__file__}", archive)
        good("restore", archive, tmp_path / str(index))
    assert sha256(tmp_path / "0" / f"disk-{name}.raw") == sha256(disk)
    assert sha256(tmp_path / "1" / f"disk-{name}=x,y.raw") == sha256(disk)


def test_the_limit_of_254_devices_is_taken_and_one_more_is_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "p")
    words = [word for index in range(255) for word in ("--disk", f"d{index}={disk}")]
    text = bad("backup", *words, tmp_path / "vm.vma", code=2)
    assert "too many drives: 255; the limit is 254" in text


def test_the_speed_limit_holds_for_all_disks_together(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 32)  # 2 MiB each
    out = good(
        *("backup", "--json", "--speed", "2M", "--disk", f"a={disk}", "--disk", f"b={disk}"),
        tmp_path / "vm.vma",
    )
    seconds = json.loads(out.splitlines()[-1])["seconds"]
    # 4 MiB at 2 MiB/s; the first MiB of each disk is not waited for.
    assert seconds >= 0.8
