# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup --nbd`: exports of real servers, as a user backs them up."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.archiver.service.serving import serving
from tests.machine import (
    Need,
    bad,
    children,
    eventually,
    good,
    listens,
    make_disk,
    next_event,
    run,
    sha256,
    started,
)
from tests.producer.pull.bitmaps import CLUSTER, DIRTY, Image, by_qemu_nbd
from tests.producer.pull.servers import free_port, served, served_on


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("disk") / "disk.raw", "AA0hhhhpAh" * 12, 65024)


@pytest.fixture
def sock(short_folder: Path) -> Path:
    return short_folder / "s"


def restored(archive: Path, name: str = "d") -> Path:
    folder = archive.parent / "restored"
    shutil.rmtree(folder, ignore_errors=True)
    good("restore", archive, folder)
    return folder / f"disk-{name}.raw"


SERVERS = {
    "nbdkit": ["nbdkit", "-f", "-r", "-U", "SOCK", "file", "DISK"],
    "qemu-nbd": ["qemu-nbd", "-r", "-t", "-f", "raw", "-e", "8", "-k", "SOCK", "DISK"],
    "one connection": ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", "SOCK", "DISK"],
    "qemu-storage-daemon": [
        *(
            "qemu-storage-daemon",
            "--blockdev",
            "driver=file,node-name=f,filename=DISK,read-only=on",
        ),
        *("--blockdev", "driver=raw,node-name=d,file=f,read-only=on"),
        *("--nbd-server", "addr.type=unix,addr.path=SOCK"),
        *("--export", "type=nbd,id=e,node-name=d,name=x"),
    ],
    "blocks of 4096": [
        *("nbdkit", "-f", "-r", "-U", "SOCK", "--filter=blocksize-policy", "file", "DISK"),
        *("blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-error-policy=error"),
    ],
    "blocks of 64K": [
        *("nbdkit", "-f", "-r", "-U", "SOCK", "--filter=blocksize-policy", "file", "DISK"),
        *("blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-maximum=64K"),
        "blocksize-error-policy=error",
    ],
    "no extents": ["nbdkit", "-f", "-r", "-U", "SOCK", "--filter=noextents", "file", "DISK"],
    "slow": [
        *("nbdkit", "-f", "-r", "-U", "SOCK", "--filter=delay", "file", "DISK"),
        *("delay-read=20ms", "delay-extents=20ms"),
    ],
}


@pytest.mark.parametrize("server", SERVERS)
def test_what_a_server_exports_is_backed_up(
    tmp_path: Path, disk: Path, sock: Path, need: Need, server: str
) -> None:
    words = [w.replace("SOCK", str(sock)).replace("DISK", str(disk)) for w in SERVERS[server]]
    if server.startswith("blocks of"):
        whole = tmp_path / "whole.raw"
        shutil.copy(disk, whole)
        os.truncate(whole, -(-disk.stat().st_size // 65536) * 65536)
        words = [word.replace(str(disk), str(whole)) for word in words]
    need(words[0])
    name = "x" if server == "qemu-storage-daemon" else ""
    with served(*words, path=sock):
        good("backup", "--nbd", f"d=nbd+unix:///{name}?socket={sock}", tmp_path / "vm.vma")
    found, wanted = restored(tmp_path / "vm.vma").read_bytes(), disk.read_bytes()
    assert found.rstrip(b"\0") == wanted.rstrip(b"\0")
    assert len(found) >= len(wanted)
    good("verify", tmp_path / "vm.vma")


@pytest.mark.parametrize("extra", [1, 511, 4095, 65535])
def test_odd_sizes_are_whole(tmp_path: Path, sock: Path, need: Need, extra: int) -> None:
    (nbdkit,) = need("nbdkit")
    odd = make_disk(tmp_path / "odd.raw", "AhA", extra)
    with served(nbdkit, "-f", "-r", "-U", sock, "file", odd, path=sock):
        good("backup", "--nbd", f"d=nbd+unix:///?socket={sock}", tmp_path / "vm.vma")
    found = restored(tmp_path / "vm.vma").read_bytes()
    assert found.ljust(odd.stat().st_size, b"\0")[: odd.stat().st_size] == odd.read_bytes()


def test_a_frozen_image_with_a_bitmap_is_read_whole(
    tmp_path: Path, disk: Path, sock: Path, need: Need
) -> None:
    """As backup programs export a snapshot: `qemu-nbd -B` offers another metadata context."""
    qemu_img, qemu_nbd = need("qemu-img", "qemu-nbd")
    image = tmp_path / "d.qcow2"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", disk, image], check=True)
    subprocess.run([qemu_img, "bitmap", "--add", image, "b0"], check=True)
    subprocess.run([qemu_img, "bitmap", "--disable", image, "b0"], check=True)
    with served(qemu_nbd, "-r", "-t", "-f", "qcow2", "-B", "b0", "-k", sock, image, path=sock):
        good("backup", "--nbd", f"d=nbd+unix:///?socket={sock}", tmp_path / "vm.vma")
    assert restored(tmp_path / "vm.vma").read_bytes().startswith(disk.read_bytes())


def test_several_exports_of_one_server_become_one_archive_beside_a_disk(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    """Over TCP, and `--disk` with a URI is the same reader: no qemu-nbd is needed."""
    (nbdkit,) = need("nbdkit")
    other = make_disk(tmp_path / "other.raw", "hAhhA", seed=7)
    port = free_port()
    words = [nbdkit, "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "file", f"dir={tmp_path}"]
    archive = tmp_path / "out" / "vm.vma"
    archive.parent.mkdir()
    with served_on(port, *words):
        at = f"nbd://127.0.0.1:{port}"
        good(
            *("backup", "--nbd", f"a={at}/other.raw", "--disk", f"b={at}/other.raw,format=raw"),
            *("--disk", f"c={disk}", archive),
        )
        assert "NBD_REP_ERR_" in bad("backup", "--nbd", f"a={at}/none.raw", tmp_path / "no.vma")
    assert sha256(restored(archive, "a")) == sha256(other)
    assert sha256(restored(archive, "b")) == sha256(other)
    assert sha256(restored(archive, "c")) == sha256(disk)


def test_a_producer_by_hand_and_an_archiver_elsewhere_take_an_export(
    tmp_path: Path, disk: Path, sock: Path, need: Need
) -> None:
    (nbdkit,) = need("nbdkit")
    uri = f"d=nbd+unix:///?socket={sock}"
    with ExitStack() as stack:
        stack.enter_context(served(nbdkit, "-f", "-r", "-U", sock, "file", disk, path=sock))
        endpoint = sock.with_name("a")
        archiver = stack.enter_context(
            started(
                "archiver",
                "--listen",
                f"ipc://{endpoint}",
                "--expect",
                "1",
                "--output",
                tmp_path / "1.vma",
            )
        )
        assert eventually(lambda: listens(endpoint))
        good("producer", "--archiver", f"ipc://{endpoint}", "--nbd", uri)
        assert archiver.wait(60) == 0
        service = stack.enter_context(serving(tmp_path))
        good("backup", *service.words, "--nbd", uri, "2.vma")
        second = service.folder / "2.vma"
        assert sha256(restored(second)) == sha256(disk)
    assert sha256(restored(tmp_path / "1.vma")) == sha256(disk)


def test_a_read_error_of_the_server_is_one_line_with_device_and_offset(
    tmp_path: Path, disk: Path, sock: Path, need: Need
) -> None:
    (nbdkit,) = need("nbdkit")
    words = [nbdkit, "-f", "-r", "-U", str(sock), "--filter=error", "file", str(disk)]
    with served(*words, "error-pread=EIO", "error-pread-rate=100%", path=sock):
        said = bad("backup", "--nbd", f"d=nbd+unix:///?socket={sock}", tmp_path / "vm.vma")
    # Its threads answer in any order.
    assert re.search(r"disk 'd': cannot read near offset \d+: Input/output error", said)
    assert not [*tmp_path.glob("vm.vma*")]


def test_a_server_that_is_started_again_in_mid_backup_is_read_on(
    tmp_path: Path, disk: Path, sock: Path, need: Need
) -> None:
    (nbdkit,) = need("nbdkit")
    words = [nbdkit, "-f", "-r", "-U", str(sock), "file", str(disk)]
    archive = tmp_path / "vm.vma"
    uri = f"d=nbd+unix:///?socket={sock}"
    with ExitStack() as stack:
        server = stack.enter_context(served(*words, path=sock))
        backup = stack.enter_context(
            started("backup", "--json", "--speed", "8M", "--nbd", uri, archive)
        )
        next_event(backup, "transfer")
        server.kill()
        server.wait()
        sock.unlink()
        stack.enter_context(served(*words, path=sock))
        assert backup.wait(60) == 0
    assert sha256(restored(archive)) == sha256(disk)


@pytest.mark.parametrize("who", ["producer", "archiver", "coordinator"])
def test_kill_9_of_any_process_leaves_nothing_and_the_server_unharmed(
    tmp_path: Path, disk: Path, sock: Path, need: Need, who: str
) -> None:
    (nbdkit,) = need("nbdkit")
    uri = f"d=nbd+unix:///?socket={sock}"
    archive = tmp_path / "out" / "vm.vma"
    archive.parent.mkdir()
    with served(nbdkit, "-f", "-r", "-U", sock, "file", disk, path=sock) as server:
        with started("backup", "--json", "--speed", "1M", "--nbd", uri, archive) as backup:
            next_event(backup, "transfer")
            pids = {
                "producer": [child.pid for child in children(backup, "producer")],
                "archiver": [child.pid for child in children(backup, "archiver")],
                "coordinator": [backup.pid],
            }[who]
            assert pids
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert backup.wait(60) != 0
        assert eventually(lambda: not [*archive.parent.iterdir()])
        assert server.poll() is None
        good("backup", "--nbd", uri, archive)
    assert sha256(restored(archive)) == sha256(disk)


def test_trim_frees_the_scratch_file_behind_the_export(
    tmp_path: Path, disk: Path, sock: Path, need: Need
) -> None:
    (nbdkit,) = need("nbdkit")
    scratch = tmp_path / "scratch.raw"
    shutil.copy(disk, scratch)
    with served(nbdkit, "-f", "-U", sock, "file", scratch, path=sock):
        good("backup", "--trim", "--nbd", f"d=nbd+unix:///?socket={sock}", tmp_path / "vm.vma")
    assert sha256(restored(tmp_path / "vm.vma")) == sha256(disk)
    assert scratch.stat().st_blocks < disk.stat().st_blocks // 4


WRONG = {
    "no name": (["--nbd", "nbd://u:SECRET@h/x"], "say NAME=URI"),
    "a password": (["--nbd", "d=nbds://u:SECRET@h/x"], "NBD has no passwords"),
    "a strange password": (["--nbd", "d=nbd://u:SE/CRET@h/x"], "host or port"),
    "with --disk": (["--disk", "d=nbd://u:SECRET@h/x,format=raw"], "NBD has no passwords"),
    "with --disk and no format": (["--disk", "d=nbd://SECRET@h/x"], "say --nbd d=nbd://h/x"),
    "with an image in it": (
        ["--disk", "d=nbd://u:SECRET@h/x,format=qcow2"],
        "NBD has no passwords",
    ),
    "words twice": (["--disk", "d=nbd://SECRET@h/x,format=raw,format=raw"], "format comes twice"),
    "no scheme": (["--nbd", "d=/dev/sda"], "an NBD URI begins with"),
    "with --qmp": (["--qmp", "/q", "--nbd", "d=nbd://h/x"], "exports that do not change"),
    "--trim alone": (["--disk", "d=/x", "--trim"], "--trim frees what --nbd has read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_are_one_clear_line_without_a_secret(tmp_path: Path, case: str) -> None:
    words, text = WRONG[case]
    done = run("backup", *words, tmp_path / "vm.vma")
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert text in said
    assert "SECRET" not in said
    assert "SE/CRET" not in said
    assert "Traceback" not in said


def test_the_user_of_a_uri_is_in_no_event_log_manifest_or_error(
    tmp_path: Path, disk: Path, sock: Path, need: Need
) -> None:
    (nbdkit,) = need("nbdkit")
    uri = f"d=nbd+unix://SECRET@/?socket={sock}"
    archive = tmp_path / "vm.vma"
    with served(nbdkit, "-f", "-r", "-U", sock, "file", disk, path=sock):
        done = run("backup", "--json", "--log-level=debug", "--nbd", uri, archive)
    assert done.returncode == 0, done.stderr
    assert b"nbd+unix:///?socket=" in done.stdout
    failed = run("backup", "--log-level=debug", "--nbd", uri, tmp_path / "no.vma")
    assert failed.returncode == 1
    everything = done.stdout + done.stderr + failed.stdout + failed.stderr
    everything += archive.read_bytes() + (tmp_path / "vm.vma.manifest.json").read_bytes()
    assert b"SECRET" not in everything


# --- with a dirty bitmap ---


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Image:
    return Image(tmp_path_factory.mktemp("image"), need)


def told(*words: str | Path) -> str:
    """All that a command that must succeed says."""
    done = run(*words)
    assert done.returncode == 0, done.stderr.decode()
    return (done.stdout + done.stderr).decode()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Path:
    archive = tmp_path_factory.mktemp("base") / "vm-2026-01-31.vma"
    good("backup", "--disk", f"d={image.base_path}", archive)
    return archive


def test_with_a_bitmap_and_a_base_only_what_has_changed_is_read(
    tmp_path: Path, short_folder: Path, image: Image, base: Path
) -> None:
    archive = tmp_path / "vm.vma"
    with by_qemu_nbd(image, short_folder) as sock:
        uri = f"d=nbd+unix:///?socket={sock},bitmap=B"
        said = told("backup", "--json", "--base", base, "--nbd", uri, archive)
    read = [int(count) for count in re.findall(r'"read_bytes": ?(\d+)', said)]
    zeroes = 4 * CLUSTER
    assert max(read) == sum(length for _, length in DIRTY) - zeroes
    assert restored(archive).read_bytes() == image.content
    good("verify", archive)


@pytest.mark.parametrize(
    ("bitmap", "words"),
    [
        ("other", "does not offer the bitmap 'other'"),
        ("vmapipe-" + 32 * "7", "records since another archive than the base"),
    ],
)
def test_a_bitmap_that_cannot_serve_is_a_full_backup_with_the_reason(
    tmp_path: Path, short_folder: Path, image: Image, base: Path, bitmap: str, words: str
) -> None:
    archive = tmp_path / "vm.vma"
    with by_qemu_nbd(image, short_folder) as sock:
        uri = f"d=nbd+unix:///?socket={sock},bitmap={bitmap}"
        said = told("backup", "--base", base, "--nbd", uri, archive)
    assert "disk 'd': all of it is read: the" in said
    assert words in said
    assert restored(archive).read_bytes() == image.content


def test_a_base_that_does_not_fit_is_a_full_backup_although_there_is_a_bitmap(
    tmp_path: Path, short_folder: Path, image: Image
) -> None:
    archive = tmp_path / "vm.vma"
    with by_qemu_nbd(image, short_folder) as sock:
        uri = f"d=nbd+unix:///?socket={sock},bitmap=B"
        said = told("backup", "--base", tmp_path / "none.vma", "--nbd", uri, archive)
    assert "all of it is read: the archiver has no base of it" in said
    assert restored(archive).read_bytes() == image.content


def test_a_bitmap_without_a_base_is_refused(tmp_path: Path) -> None:
    uri = "d=nbd+unix:///?socket=/run/s,bitmap=B"
    assert "name that with --base" in bad("backup", "--nbd", uri, tmp_path / "vm.vma", code=2)


def test_what_was_freed_is_never_read_again_for_a_full_backup(
    tmp_path: Path, short_folder: Path, image: Image, base: Path
) -> None:
    """The base turns out to be damaged when a part of the scratch file is gone."""
    damaged = tmp_path / "base.vma"
    for path in (base, base.with_name(base.name + ".manifest.json")):
        shutil.copy(path, tmp_path / path.name.replace(base.name, damaged.name))
    with damaged.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"damage")
    copy = Path(shutil.copy(image.path, tmp_path / "copy.qcow2"))
    with by_qemu_nbd(image, short_folder, path=copy, writable=True) as sock:
        uri = f"d=nbd+unix:///?socket={sock},bitmap=B"
        said = bad("backup", "--base", damaged, "--trim", "--nbd", uri, tmp_path / "vm.vma")
    assert "the base" in said
    assert "damaged" in said
    assert not (tmp_path / "vm.vma").exists()
