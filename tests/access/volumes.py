# SPDX-License-Identifier: Apache-2.0
"""Encrypted and logical volumes for tests, made by other programs and without a kernel's help."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

from tests.machine import Need

KEY = b"the words of a key"
GOLDEN = Path(__file__).parent / "golden"
EXTENT_BYTES, FIRST_EXTENT = 128 << 10, 1 << 20
#: The extents of golden/'s volumes, in order: the physical volume, its extent (README.md there).
ROOT = [("a", extent) for extent in (*range(16), *range(20, 36))]
SPAN = [*(("b", extent) for extent in range(24)), *(("a", extent) for extent in range(70, 86))]


def encrypted(
    need: Need,
    content: bytes,
    image: Path,
    *,
    cipher: str = "aes-xts-plain64",
    bits: int = 512,
    hash_name: str = "sha256",
) -> bytes:
    """Make a LUKS1 volume with this content: cryptsetup writes the header, QEMU the data."""
    cryptsetup, qemu_img = need("cryptsetup", "qemu-img")
    key, plain = image.with_suffix(".key"), image.with_suffix(".plain")
    key.write_bytes(KEY)
    plain.write_bytes(content)
    with image.open("wb") as file:
        file.truncate((2 << 20) + len(content))
    words = ["--batch-mode", "--pbkdf-force-iterations", "1000", "--key-file", str(key)]
    more = ["--cipher", cipher, "--key-size", str(bits), "--hash", hash_name]
    subprocess.run([cryptsetup, "luksFormat", "--type", "luks1", *words, *more, image], check=True)
    secret = f"secret,id=key,file={key}"
    target = f"driver=luks,key-secret=key,file.driver=file,file.filename={image}"
    subprocess.run(
        [
            *(qemu_img, "convert", "-n", "--object", secret),
            *("-f", "raw", plain, "--target-image-opts", target),
        ],
        check=True,
    )
    plain.unlink()
    return KEY


def physical_volumes() -> dict[str, bytearray]:
    """The two of golden/, their extents empty."""
    sizes = {"a": 12 << 20, "b": 8 << 20}
    return {
        name: bytearray(
            lzma.decompress((GOLDEN / f"lvm-{name}.xz").read_bytes()).ljust(size, b"\0")
        )
        for name, size in sizes.items()
    }


def put(pvs: dict[str, bytearray], extents: list[tuple[str, int]], content: bytes) -> None:
    """Write a logical volume's content where its extents are."""
    for index, (name, extent) in enumerate(extents):
        piece = content[index * EXTENT_BYTES : (index + 1) * EXTENT_BYTES]
        at = FIRST_EXTENT + extent * EXTENT_BYTES
        pvs[name][at : at + len(piece)] = piece


def put_striped(pvs: dict[str, bytearray], content: bytes) -> None:
    """The same for the volume `striped`: 32 KiB on a, then on b, and so on."""
    width = 32 << 10
    for index in range(0, len(content), width):
        row, column = divmod(index // width, 2)
        name, extent = (("a", 36), ("b", 24))[column]
        at = FIRST_EXTENT + extent * EXTENT_BYTES + row * width
        piece = content[index : index + width]
        pvs[name][at : at + len(piece)] = piece
