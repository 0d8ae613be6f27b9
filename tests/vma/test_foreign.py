# SPDX-License-Identifier: Apache-2.0
"""What is no VMA archive is named for what it is, and nothing of an archive is."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machine import Need
from tests.vma.archives import header, pack
from vmapipe.vma.foreign import ISO_MARK_AT, START_BYTES, foreign_kind
from vmapipe.vma.header import Config


def tar(first: str, kind: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as file:
        info = tarfile.TarInfo(first)
        info.size = 5
        file.addfile(info, io.BytesIO(b"hello"))
    return out.getvalue()


def old_tar() -> bytes:
    """As before POSIX: only the checksum tells it."""
    raw = bytearray(tar("notes.txt"))
    raw[257:265] = bytes(8)
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    return bytes(raw)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("vm.vma", "x")
    return out.getvalue()


def at(position: int, mark: bytes) -> bytes:
    return b"\x01" * position + mark + b"\x01" * 600


CASES: dict[str, tuple[bytes, str]] = {
    "tar": (tar("vm.vma"), "a tar file"),
    "GNU tar": (tar("vm.vma", tarfile.GNU_FORMAT), "a tar file"),
    "old tar": (old_tar(), "a tar file"),
    "container": (tar("./etc/hostname"), "a container's backup"),
    "ova": (tar("machine.ovf"), "an OVA"),
    "ovf": (b'<?xml version="1.0"?>\n<Envelope xmlns:ovf="http://x">' + b" " * 600, "an OVF"),
    "zip": (zipped(), "a zip file"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04" + bytes(100), "a 7z file"),
    "rar": (b"Rar!\x1a\x07\x01\0" + bytes(100), "a RAR file"),
    "iso": (at(ISO_MARK_AT, b"CD001"), "an ISO 9660 image"),
    "zstd in zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "compressed twice"),
    "gzip in zstd": (b"\x1f\x8b\x08" + bytes(100), "compressed twice"),
    "lzo in zstd": (b"\x89LZO\0\r\n" + bytes(100), "compressed twice"),
    "xz in zstd": (b"\xfd7zXZ\0" + bytes(100), "compressed with xz"),
    "qcow2": (b"QFI\xfb\0\0\0\3" + bytes(600), "a qcow2 image"),
    "vmdk": (b"KDMV\1\0\0\0" + bytes(600), "a VMDK image"),
    "vmdk description": (b"# Disk DescriptorFile\nversion=1\n", "a VMDK image"),
    "vdi": (at(64, b"\x7f\x10\xda\xbe"), "a VDI image"),
    "vhdx": (b"vhdxfile" + bytes(600), "a VHDX image"),
    "raw": (at(510, b"\x55\xaa"), "a raw disk image"),
    "zeroes": (bytes(5000), "nothing but zeroes"),
    "pbs index": (bytes([47, 127, 65, 237, 145, 253, 15, 205]) + bytes(600), "Proxmox Backup"),
    "pbs blob": (bytes([66, 171, 56, 7, 190, 112, 160, 49]) + bytes(60), "Proxmox Backup"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "the download failed"),
    "html 2": (b"<HTML><head><title>404</title>", "the download failed"),
    "store's error": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "an XML"),
    "manifest": (b'{"format": "vmapipe-manifest", "version": 1,', "a manifest"),
    "text": (b"#qmdump#map:scsi0:drive-scsi0:local:raw:\nmemory: 512\n", "a text"),
    "umlauts": ("Sicherung der Maschine für Jürgen\n".encode(), "a text"),
    "middle": (b"VMAE\0\0\0\1" + bytes(504), "its beginning, with the header, is missing"),
    "pgp": (b"-----BEGIN PGP MESSAGE-----\n\nhQIMA", "encrypted with GnuPG"),
    "program": (b"\x7fELF\2\1\1", "a program"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_file_is_named_from_its_beginning(case: str) -> None:
    start, words = CASES[case]
    kind = foreign_kind(start[:START_BYTES])
    assert kind is not None
    assert words in kind


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc"])
def test_each_image_that_qemu_makes_is_named(image_format: str, tmp_path: Path, need: Need) -> None:
    (qemu_img,) = need("qemu-img")
    path = tmp_path / "image"
    subprocess.run([qemu_img, "create", "-q", "-f", image_format, path, "8M"], check=True)
    kind = foreign_kind(path.read_bytes()[:START_BYTES])
    assert kind is not None
    assert " image: " in kind or kind.startswith("nothing but zeroes")


def test_noise_is_named_as_nothing() -> None:
    assert foreign_kind(b"\x93\x01\xfe\x07" * 300) is None
    assert foreign_kind(b"") is None


@given(st.binary(max_size=700), st.integers(0, 600))
def test_any_bytes_are_taken(start: bytes, position: int) -> None:
    assert foreign_kind(start) is None or foreign_kind(start)
    text = foreign_kind(at(position, b"CD001"))
    assert text is None or text


def test_an_archive_is_not_foreign() -> None:
    raw = pack(header(configs=[Config("a", b"b")]), [])
    assert foreign_kind(raw[:START_BYTES]) is None
