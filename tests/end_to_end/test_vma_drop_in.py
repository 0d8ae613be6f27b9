# SPDX-License-Identifier: Apache-2.0
"""`vma` as scripts use the reference tool."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden_archives import GoldenItem
from tests.machine import LIMIT_S, VMA, Need, bad, good, make_disk, run, sha256


def vma(*words: str | Path, **more: object) -> str:
    return good(*words, tool=VMA, **more).decode()


def test_list_prints_configs_devices_memory_and_last_the_time(golden: Path) -> None:
    out = vma("list", golden / "g20-vmstate.vma", env={**os.environ, "TZ": "UTC"}).splitlines()
    assert out[0] == "CFG: size: 150 name: qemu-server.conf"
    assert out[1] == "DEV: dev_id=1 size: 3735552 devname: drive-scsi0"
    assert out[2] == "VMSTATE: dev_id=2 memory: 196608"
    assert out[3].startswith("CTIME: Mon Nov 23 ")
    assert len(out) == 4


def test_config_prints_the_default_or_the_named_one(golden: Path) -> None:
    archive = golden / "g02-two-disks-cfg.vma"
    assert vma("config", archive).startswith("boot: order=scsi0")
    assert vma("config", archive, "-c", "qemu-server.fw").startswith("[OPTIONS]")
    assert "qemu-server.fw" in bad("config", archive, "-c", "x", tool=VMA)


def test_every_golden_archive_extracts_to_its_digests_as_file_pipe_and_zst(
    golden: Path, golden_digests: dict[str, list[GoldenItem]], tmp_path: Path, need: Need
) -> None:
    (zstd,) = need("zstd")
    for name, items in golden_digests.items():
        packed = tmp_path / f"{name}.zst"
        subprocess.run([zstd, "-q", golden / name, "-o", packed], check=True)
        with (golden / name).open("rb") as stdin:
            vma("extract", golden / name, tmp_path / f"{name}-file")
            vma("extract", "-", tmp_path / f"{name}-pipe", stdin=stdin)
            vma("extract", packed, tmp_path / f"{name}-zst")
        vma("verify", golden / name)
        for kind in ("file", "pipe", "zst"):
            folder = tmp_path / f"{name}-{kind}"
            for item in items:
                if item.kind == "config":
                    path = folder / item.name
                elif item.name == "vmstate":
                    path = folder / "vmstate.bin"
                else:
                    path = folder / f"disk-{item.name}.raw"
                assert (path.stat().st_size, sha256(path)) == (item.size_bytes, item.sha256), path
            assert len(list(folder.iterdir())) == len(items)


def test_what_qmrestore_does_works(golden: Path, tmp_path: Path, need: Need) -> None:
    """zstd -dc | vma extract -v -r FIFO - DIR; the map is written when CTIME appears."""
    (zstd,) = need("zstd")
    packed, fifo = tmp_path / "vm.vma.zst", tmp_path / "map.fifo"
    archive = golden / "g02-two-disks-cfg.vma"
    subprocess.run([zstd, "-q", archive, "-o", packed], check=True)
    os.mkfifo(fifo)
    scsi, virtio = tmp_path / "vm-100-disk-0.raw", tmp_path / "vm-100-disk-1.raw"
    scsi.write_bytes(b"\xff" * 3145728)
    with virtio.open("wb") as file:
        file.truncate(340480 + 4096)
    cat = subprocess.Popen([zstd, "-q", "-d", "-c", packed], stdout=subprocess.PIPE)
    extract = subprocess.Popen(
        [*VMA, "extract", "-v", "-r", fifo, "-", tmp_path / "out"],
        stdin=cat.stdout,
        stdout=subprocess.PIPE,
    )
    assert cat.stdout is not None
    assert extract.stdout is not None
    cat.stdout.close()
    seen = []
    for line in extract.stdout:
        seen.append(line.decode())
        if line.startswith(b"CTIME"):
            break
    assert (tmp_path / "out" / "qemu-server.conf").exists(), "configs come before the map"
    fifo.write_text(
        f"format=raw:throttling.bps=1073741824:throttling.group=restore:1:drive-scsi0={scsi}\n"
        f"format=raw:0:drive-virtio0={virtio}\ndone\n"
    )
    rest, _ = extract.communicate(timeout=LIMIT_S)
    assert extract.returncode == 0
    assert cat.wait(LIMIT_S) == 0
    assert [line.split(":")[0] for line in seen] == ["CFG", "CFG", "DEV", "DEV", "CTIME"]
    assert b"progress 100% (read 3538944 bytes, duration " in rest
    assert b"total bytes read 3538944, sparse bytes 0 (0%)" in rest
    assert b"space reduction due to 4K zero blocks 1.39%" in rest
    assert sha256(scsi).startswith("3a46180828696ca0")
    assert virtio.stat().st_size == 340480 + 4096


def test_extract_prints_where_each_disk_goes_and_creates_the_folder(
    golden: Path, tmp_path: Path
) -> None:
    out = vma("extract", golden / "g10-512b.vma", tmp_path / "new")
    assert out == f"DEVINFO {tmp_path}/new/tmp-disk-drive-ide0.raw 512\n"
    text = bad("extract", golden / "g10-512b.vma", tmp_path / "new", tool=VMA)
    assert "unable to create target directory" in text


def test_extract_takes_only_the_drives_that_d_names(golden: Path, tmp_path: Path) -> None:
    archive = golden / "g03-four-disks.vma"
    vma("extract", archive, "-d", "drive-ide0,drive-virtio0", tmp_path / "two")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        "disk-drive-ide0.raw",
        "disk-drive-virtio0.raw",
        "qemu-server.conf",
    }
    text = bad("extract", archive, "-d", "drive-ide9", tmp_path / "none", tool=VMA, code=2)
    assert "drive-ide9" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:drive-scsi0", "read map failed - no dev name specified ('1:drive-scsi0')"),
        ("nonsense", "read map failed - parse error ('nonsense')"),
        ("format=raw", "read map failed - option 'format' not terminated ('format=raw')"),
        ("skip", "read map failed - option 'skip' has no value ('skip')"),
        ("throttling.bps=x:1:drive-scsi0=/x", "not a number: x"),
        ("cache=odd:1:drive-scsi0=/x", "invalid cache option: odd"),
        ("skip=drive-scsi0", "no device name mapping for drive-virtio0"),
    ],
)
def test_a_wrong_map_gets_the_words_of_the_reference(
    golden: Path, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "map").write_text(text + "\n")
    archive = golden / "g02-two-disks-cfg.vma"
    said = bad("extract", "-r", tmp_path / "map", archive, tmp_path / "out", tool=VMA, code=2)
    assert words in said


def test_create_speaks_both_grammars_and_says_what_it_did(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", "A0p", 4096)
    config = tmp_path / "qemu-server.conf"
    config.write_text("x")
    out = vma(
        *("create", tmp_path / "new.vma", "-v", "-c", config),
        *("-d", f"format=raw:drive-scsi0={disk}"),
    )
    assert out.splitlines()[-1] == "image drive-scsi0: size=135168 zeros=69632 saved=65536"
    assert "progress 100% 135168/135168 69632" in out
    vma("create", tmp_path / "old.vma", f"drive-x={disk}", disk)
    listed = vma("list", tmp_path / "old.vma")
    assert "dev_id=1 size: 135168 devname: drive-x" in listed
    assert "dev_id=2 size: 135168 devname: disk1" in listed
    assert not (tmp_path / "new.vma.manifest.json").exists(), "a drop-in leaves no other file"
    vma("verify", tmp_path / "old.vma")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-d", "format=raw:a=DISK", "DISK"], "Unexpected extra argument - specify all devices"),
        (["-d", "a=DISK"], "No format specified for device: 'a="),
    ],
)
def test_create_refuses_in_the_words_of_the_reference(
    tmp_path: Path, words: list[str], text: str
) -> None:
    disk = make_disk(tmp_path / "disk.raw", "A")
    filled = [word.replace("DISK", str(disk)) for word in words]
    assert text in bad("create", tmp_path / "x.vma", *filled, tool=VMA, code=2)
    assert not (tmp_path / "x.vma").exists()


def flip(path: Path, at: int) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: flip(p, 0), "not a vma file - wrong magic number"),
        (lambda p: flip(p, 20), "wrong vma header chechsum"),
        (lambda p: flip(p, 12800 + 100), "verify failed - wrong vma extent header chechsum"),
        (lambda p: flip(p, 12800 + 10), "verify failed - wrong vma extent uuid"),
        (lambda p: flip(p, 12800), "verify failed - wrong vma extent header magic"),
        (lambda p: os.truncate(p, 12800), "verify failed - detected missing cluster 0 for stream"),
        (lambda p: os.truncate(p, 12800 + 100), "verify failed - read short extent (100 bytes)"),
        (lambda p: os.truncate(p, 12800 + 5000), "verify failed - short vma extent (5000 < "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verify_finds_damage_and_says_it_in_the_words_of_the_reference(
    golden: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    broken = Path(shutil.copy(golden / "g06-c58.vma", tmp_path / "broken.vma"))
    damage(broken)
    assert words in bad("verify", broken, tool=VMA, code=4)
    assert run("verify", "-v", broken, tool=VMA).returncode == 4
