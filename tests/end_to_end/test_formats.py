# SPDX-License-Identifier: Apache-2.0
"""Images that are not raw, from one format through an archive to another."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMA, Need, bad, good, listens, make_disk, run, sha256
from vmapipe.producer.image_source import HowToRead, ImageReader
from vmapipe.producer.source import DiskSourceError
from vmapipe.runtime.cancel import Cancel


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", "AA0hhhhpAh" * 20, tail_bytes=65024)


@pytest.fixture
def qcow2(tmp_path: Path, disk: Path, need: Need) -> Path:
    qemu_img, _ = need("qemu-img", "qemu-nbd")
    image = tmp_path / "disk.qcow2"
    words = [qemu_img, "convert", "-O", "qcow2", str(disk), str(image)]
    subprocess.run(words, check=True, timeout=LIMIT_S)
    return image


def test_a_qcow2_and_a_raw_image_go_into_one_archive_and_come_back_the_other_way_round(
    tmp_path: Path, disk: Path, qcow2: Path, need: Need
) -> None:
    qemu_img, _ = need("qemu-img", "qemu-storage-daemon")
    archive = tmp_path / "vm.vma"
    good("backup", "--disk", f"a={qcow2},format=qcow2", "--disk", f"b={disk}", archive)
    good("verify", archive)
    back = tmp_path / "b.qcow2"
    good(
        "restore", archive, tmp_path / "out", "--device", "a", "--device", f"b={back},format=qcow2"
    )
    assert sha256(tmp_path / "out" / "disk-a.raw") == sha256(disk)
    words = [qemu_img, "compare", "-f", "raw", "-F", "qcow2", str(disk), str(back)]
    assert subprocess.run(words, capture_output=True, timeout=LIMIT_S).returncode == 0


@pytest.mark.parametrize("image_format", ["vmdk", "vhdx", "vdi", "qed"])
def test_an_image_of_any_format_of_qemu_holds_in_the_archive_what_qemu_reads_from_it(
    tmp_path: Path, disk: Path, need: Need, image_format: str
) -> None:
    qemu_img, _ = need("qemu-img", "qemu-nbd")
    image, expected = tmp_path / "disk.image", tmp_path / "expected.raw"
    for words in (
        ["-f", "raw", "-O", image_format, disk, image],
        # Some formats round a size up.
        ["-f", image_format, "-O", "raw", image, expected],
    ):
        subprocess.run([qemu_img, "convert", *map(str, words)], check=True, timeout=LIMIT_S)
    good("backup", "--disk", f"d={image},format={image_format}", tmp_path / "vm.vma")
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-d.raw") == sha256(expected)


def test_a_raw_disk_that_begins_at_an_offset_is_backed_up_from_there(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    need("qemu-nbd")
    image = tmp_path / "with-header.raw"
    image.write_bytes(b"header" * 1024 + bytes(512 * 24) + disk.read_bytes())
    offset = image.stat().st_size - disk.stat().st_size
    words = f"d={image},format=raw,offset={offset}"
    good("backup", "--disk", words, tmp_path / "vm.vma")
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-d.raw") == sha256(disk)


def test_an_internal_snapshot_is_backed_up_by_its_name_whatever_was_written_since(
    tmp_path: Path, disk: Path, qcow2: Path, need: Need
) -> None:
    qemu_img, qemu_io = need("qemu-img", "qemu-io")
    for words in (
        [qemu_img, "snapshot", "-c", "before", str(qcow2)],
        [qemu_io, "-f", "qcow2", "-c", "write -P 7 100K 1M", str(qcow2)],
    ):
        subprocess.run(words, check=True, capture_output=True, timeout=LIMIT_S)
    good("backup", "--disk", f"d={qcow2},format=qcow2,snapshot=before", tmp_path / "old.vma")
    good("restore", tmp_path / "old.vma", tmp_path / "old")
    assert sha256(tmp_path / "old" / "disk-d.raw") == sha256(disk)
    good("backup", "--disk", f"d={qcow2},format=qcow2", tmp_path / "new.vma")
    good("restore", tmp_path / "new.vma", tmp_path / "new")
    assert sha256(tmp_path / "new" / "disk-d.raw") != sha256(disk)


def test_the_drop_in_takes_a_format_as_the_reference_tool_does(
    tmp_path: Path, disk: Path, qcow2: Path
) -> None:
    done = run("create", tmp_path / "vm.vma", "-d", f"format=qcow2:d={qcow2}", tool=VMA)
    assert done.returncode == 0, done.stderr
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-d.raw") == sha256(disk)


def test_what_looks_like_a_qcow2_is_refused_and_told_first_that_a_raw_disk_may_look_so(
    tmp_path: Path, qcow2: Path
) -> None:
    """A guest wrote it, and who follows the first advice must not archive the host's files."""
    words = bad("backup", "--disk", f"d={qcow2}", tmp_path / "vm.vma", code=2)
    raw, image = f"say d={qcow2},format=raw", f"d={qcow2},format=qcow2"
    assert 0 < words.find(raw) < words.find(image)


SECRET = b"only root may read this file of the host\n" * 100


def image_with_a_reference(kind: str, folder: Path, secret: Path) -> Path:
    """An image whose maker, for instance a guest, has chosen a file of the host."""
    image = folder / f"disk.{kind}"
    image_format = kind.partition("-")[0]
    of_secret = {
        "qcow2-backing": ["-b", str(secret), "-F", "raw"],
        "qcow2-json": [
            "-b",
            f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}',
            "-F",
            "raw",
        ],
        "qcow2-data": ["-o", f"data_file={secret},data_file_raw=on", "1M"],
        "qcow-backing": ["1M"],
        "qed-backing": ["-b", str(secret), "-F", "raw"],
    }
    if kind == "vmdk-extent":
        sectors = secret.stat().st_size // 512
        image.write_text(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
            f'createType="monolithicFlat"\nRW {sectors} FLAT "{secret}" 0\n'
        )
        return image
    if kind == "vmdk-parent":
        base = folder / "base.vmdk"
        subprocess.run(["qemu-img", "create", "-qf", "vmdk", base, "1M"], check=True)
        words = ["-b", str(base), "-F", "vmdk"]
    else:
        words = of_secret[kind]
    create = ["qemu-img", "create", "-q", "-f", image_format, *words[:-1], str(image), words[-1]]
    if "1M" not in words:
        create = ["qemu-img", "create", "-q", "-f", image_format, *words, str(image)]
    subprocess.run(create, check=True, timeout=LIMIT_S)
    if kind == "qcow-backing":
        # As a guest would: no program makes one of this old format without a backing format.
        with image.open("r+b") as file:
            end, name = file.seek(0, 2), bytes(secret)
            file.write(name)
            file.seek(8)
            file.write(struct.pack(">QI", end, len(name)))
    secret.write_bytes(SECRET + bytes(-len(SECRET) % 512))
    return image


KINDS = ("qcow2-backing", "qcow2-json", "qcow2-data", "qcow-backing", "qed-backing", "vmdk-extent")


@pytest.mark.parametrize("kind", [*KINDS, "vmdk-parent"])
def test_an_image_that_refers_to_another_file_is_refused_unless_that_is_asked_for(
    tmp_path: Path, need: Need, kind: str
) -> None:
    need("qemu-img", "qemu-nbd")
    secret = tmp_path / "shadow"
    secret.write_bytes(SECRET + bytes(-len(SECRET) % 512))
    image = image_with_a_reference(kind, tmp_path, secret)
    image_format = kind.partition("-")[0]
    archive = tmp_path / "vm.vma"
    words = bad("backup", "--disk", f"d={image},format={image_format}", archive)
    assert "the image refers to another file" in words
    assert ",format=raw" in words
    done = run("create", archive, "-d", f"format={image_format}:d={image}", tool=VMA)
    assert done.returncode == 1
    assert b"the image refers to another file" in done.stderr
    assert not archive.exists()
    good("backup", "--disk", f"d={image},format={image_format},others=yes", archive)
    done = run(
        *("create", tmp_path / "2.vma", "-d", f"format={image_format},others=yes:d={image}"),
        tool=VMA,
    )
    assert done.returncode == 0, done.stderr
    good("restore", archive, tmp_path / "out")
    if kind != "vmdk-parent":
        assert (tmp_path / "out" / "disk-d.raw").read_bytes().startswith(SECRET)


def test_a_reference_that_only_qemu_sees_is_refused_when_it_has_opened_the_file(
    tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For instance one that was written between our look and QEMU's."""
    need("qemu-img", "qemu-nbd")
    secret = tmp_path / "shadow"
    secret.write_bytes(SECRET + bytes(-len(SECRET) % 512))
    image = image_with_a_reference("qcow2-backing", tmp_path, secret)
    monkeypatch.setattr("vmapipe.producer.image_source.references", lambda *words: [])
    cancel = Cancel()
    with pytest.raises(DiskSourceError, match=r"refers to another file.*shadow"):
        ImageReader("d", str(image), HowToRead("qcow2"), cancel)
    cancel.close()


def test_an_image_that_cannot_be_looked_at_beforehand_is_refused_unless_that_is_asked_for(
    tmp_path: Path, need: Need
) -> None:
    need("qemu-nbd")
    words = bad("backup", "--disk", "d=nbd://127.0.0.1:9/d,format=qcow2", tmp_path / "vm.vma")
    assert "it cannot be seen which other files" in words
    assert "others=yes" in words


@pytest.mark.parametrize("word", ["others=maybe", "others="])
def test_whether_others_may_be_read_is_yes_or_no(tmp_path: Path, qcow2: Path, word: str) -> None:
    words = bad("backup", "--disk", f"d={qcow2},format=qcow2,{word}", tmp_path / "v", code=2)
    assert "others is yes or no" in words


def test_what_an_nbd_server_exports_is_backed_up_by_its_uri(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    """One that is not QEMU's: any server will do. As `--nbd` does it, without qemu-nbd."""
    (nbdkit,) = need("nbdkit")
    socket = tmp_path / "nbd.sock"
    words = [nbdkit, "-f", "-r", "-U", str(socket), "file", str(disk)]
    with subprocess.Popen(words) as server:
        try:
            while not listens(socket):
                assert server.poll() is None
            uri = f"nbd+unix:///?socket={socket}"
            good("backup", "--disk", f"d={uri},format=raw", tmp_path / "vm.vma")
        finally:
            server.terminate()
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-d.raw") == sha256(disk)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (",format=", "is not a valid format"),
        (",format=qcow2,format=raw", "format comes twice"),
        (",snapshot=x", "say the format, too"),
        (",format=raw,offset=much", "is not a valid size"),
    ],
)
def test_wrong_words_behind_a_path_are_one_clear_line(
    tmp_path: Path, disk: Path, more: str, text: str
) -> None:
    assert text in bad("backup", "--disk", f"d={disk}{more}", tmp_path / "vm.vma", code=2)


def test_an_image_that_is_not_what_it_is_said_to_be_fails_in_qemus_words(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    need("qemu-nbd")
    words = bad("backup", "--disk", f"d={disk},format=qcow2", tmp_path / "vm.vma")
    assert "disk 'd': " in words
    assert "not in qcow2 format" in words
    assert not (tmp_path / "vm.vma").exists()


def test_an_image_in_use_by_a_program_that_writes_to_it_is_refused(
    tmp_path: Path, qcow2: Path, need: Need
) -> None:
    (qemu_nbd,) = need("qemu-nbd")
    socket = tmp_path / "writer.sock"
    words = [qemu_nbd, "-t", "-k", str(socket), "-f", "qcow2", str(qcow2)]
    with subprocess.Popen(words) as writer:
        try:
            while not listens(socket):
                assert writer.poll() is None
            said = bad("backup", "--disk", f"d={qcow2},format=qcow2", tmp_path / "vm.vma")
            assert f"(process {writer.pid})" in said
            assert "--force-share" in said
        finally:
            writer.terminate()
