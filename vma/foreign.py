# SPDX-License-Identifier: Apache-2.0
"""Names what is not a VMA archive, from its first bytes. Pure."""

from __future__ import annotations

from vmapipe.vma.seektable import ZSTD_MAGIC

# An ISO's mark is the furthest from the start; a tar's stands at 257.
ISO_MARK_AT = 32769
_TAR_MARK_AT = 257
_TAR_HEADER_BYTES = 512
_TAR_SUM_AT, _TAR_SUM_BYTES = 148, 8
START_BYTES = ISO_MARK_AT + 5
# What a file of text may hold beside printable characters.
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")
_TEXT_LOOK_BYTES = 512
_MAX_UTF8_BYTES = 4

# Magic: the compression's name, and a command that undoes it.
FOREIGN_COMPRESSIONS = {
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
    b"\x02\x21\x4c\x18": ("lz4", "lz4 -dc"),  # its older format
    b"LZIP": ("lzip", "lzip -dc"),
    b"\x5d\x00\x00": ("lzma", "xz -dc --format=lzma"),
    b"\x1f\x9d": ("compress (.Z)", "zcat"),
}
_KNOWN_COMPRESSIONS = {ZSTD_MAGIC: "zstd", b"\x1f\x8b": "gzip", b"\x89LZO": "lzop"}

_IMAGE = "it holds one disk, and no archive; qemu-img can convert it"
_PACKED = "unpack it, and name the archive that is in it"
_PBS = (
    "a part of a Proxmox Backup Server's datastore; restore it with proxmox-backup-client or "
    "Proxmox VE"
)
_MAGICS: dict[bytes, str] = {
    b"QFI\xfb": f"a qcow2 image: {_IMAGE}",
    b"QED\0": f"a QED image: {_IMAGE}",
    b"KDMV": f"a VMDK image: {_IMAGE}",
    b"COWD": f"a VMDK image: {_IMAGE}",
    b"# Disk DescriptorFile": f"a VMDK image's description: {_IMAGE}",
    b"vhdxfile": f"a VHDX image: {_IMAGE}",
    b"conectix": f"a VHD (vpc) image: {_IMAGE}",
    b"cxsparse": f"a VHD (vpc) image: {_IMAGE}",
    b"WithoutFreeSpace": f"a Parallels image: {_IMAGE}",
    b"WithouFreSpacExt": f"a Parallels image: {_IMAGE}",
    b"LUKS\xba\xbe": "a LUKS volume: open it first (cryptsetup), and name the archive that is in it",
    b"PK\x03\x04": f"a zip file: {_PACKED}",
    b"PK\x05\x06": "an empty zip file",
    b"PK\x07\x08": f"a zip file: {_PACKED}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z file: {_PACKED}",
    b"Rar!\x1a\x07": f"a RAR file: {_PACKED}",
    b"!<arch>\n": f"an ar archive (or a Debian package): {_PACKED}",
    b"070701": f"a cpio archive: {_PACKED}",
    b"070707": f"a cpio archive: {_PACKED}",
    b"age-encryption.org/": "encrypted with age, of another version: decrypt it on the way, with "
    "exec:'age -d FILE'",
    b"-----BEGIN AGE ENCRYPTED": "encrypted with age, and in letters: decrypt it on the way, with "
    "exec:'age -d -i KEY FILE'",
    b"-----BEGIN PGP MESSAGE": "encrypted with GnuPG: decrypt it on the way, with exec:'gpg -d FILE'",
    b"Salted__": "encrypted with openssl: decrypt it on the way, with exec:COMMAND",
    b"RCLONE\0\0": "encrypted with rclone: copy it through rclone, which decrypts it",
    b"hsqs": f"a SquashFS file system: {_PACKED}",
    b"\x42\xab\x38\x07\xbe\x70\xa0\x31": _PBS,  # uncompressed blob
    b"\x31\xb9\x58\x42\x6f\xb6\xa3\x7f": _PBS,  # compressed blob
    b"\x7b\x67\x85\xbe\x22\x2d\x4c\xf0": _PBS,  # encrypted blob
    b"\xe6\x59\x1b\xbf\x0b\xbf\xd8\x0b": _PBS,  # encrypted compressed blob
    b"\x2f\x7f\x41\xed\x91\xfd\x0f\xcd": _PBS,  # fixed index
    b"\x1c\x91\x4e\xa5\x19\xba\xb3\xcd": _PBS,  # dynamic index
    b"VMAE": "the inside of a VMA archive: its beginning, with the header, is missing",
    b"QEVM": "a machine's saved state (QEMU's migration stream), and no archive",
    b"\x7fELF": "a program (ELF)",
    b"%PDF-": "a PDF document",
    b"EFI PART": "a partition table, and no archive",
    b"SQLite format 3\0": "an SQLite database",
    b"borg": "a part of a Borg repository: borg extract gets the archive out of it",
}
# How a text begins in lower case, and what it is.
_TEXTS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"<!doctype html", b"<html", b"<head", b"<body", b"<script"),
        "an HTML page: the download failed (an error page, or one that asks for a login) and "
        "was stored in the archive's place",
    ),
    (
        (b"<?xml", b"<error"),
        "an XML document, as an object store's error is: the download may have failed and been "
        "stored in the archive's place",
    ),
    (
        (b'{"format": "vmapipe-manifest"', b'{"format": "vmapipe-sealed-manifest"'),
        "a manifest: name the archive that lies beside it, without .manifest.json",
    ),
    ((b"{", b"["), "a JSON document (or a configuration), and no archive"),
)
# Position, mark, kind.
_MARKS = (
    (ISO_MARK_AT, b"CD001", "an ISO 9660 image (a CD or DVD), and no archive"),
    (64, b"\x7f\x10\xda\xbe", f"a VDI image: {_IMAGE}"),
    (510, b"\x55\xaa", "a raw disk image (it begins with a boot sector), and no archive"),
    (1080, b"\x53\xef", "a raw image of an ext file system, and no archive"),
)
# pxar, Proxmox Backup's own archives: the first number is the kind of their first entry.
_PXAR_STARTS = (0x781B64B46D33DD1F, 0xD5956474E588ACEF, 0x730F6C75DF16A40D)


def foreign_kind(start: bytes) -> str | None:
    """Return what a file that begins with `start` is instead of an archive; None: not known.

    `start`: `START_BYTES`, or all of a shorter file.
    """
    for magic, (name, _) in FOREIGN_COMPRESSIONS.items():
        if start.startswith(magic):
            return f"compressed with {name} once more: decompress it on the way"
    for magic, name in _KNOWN_COMPRESSIONS.items():
        if start.startswith(magic):
            return (
                f"compressed twice, the inner time with {name}: take one of them off on the way, "
                "with exec:'COMMAND FILE'"
            )
    for magic, kind in _MAGICS.items():
        if start.startswith(magic):
            return kind
    return _by_structure(start) or _text_kind(start)


def _by_structure(start: bytes) -> str | None:
    """Recognise formats whose magic is not at the first byte."""
    if _is_tar(start):
        return _tar_kind(start)
    for at, mark, kind in _MARKS:
        if start[at : at + len(mark)] == mark:
            return kind
    if len(start) >= 8 and int.from_bytes(start[:8], "little") in _PXAR_STARTS:
        return "a pxar archive of Proxmox Backup: restore it with its own tools (pxar extract)"
    if len(start) >= _TEXT_LOOK_BYTES and not start.strip(b"\0"):
        return "nothing but zeroes at its beginning: a raw image, or a file whose data was lost"
    return None


def _is_tar(start: bytes) -> bool:
    """By its mark, or for the oldest kind by the checksum of its first header."""
    if start[_TAR_MARK_AT : _TAR_MARK_AT + 5] == b"ustar":
        return True
    header = start[:_TAR_HEADER_BYTES]
    digits = header[_TAR_SUM_AT : _TAR_SUM_AT + _TAR_SUM_BYTES].strip(b" \0")
    if len(header) < _TAR_HEADER_BYTES or not digits or digits.strip(b"01234567") or not header[0]:
        return False
    unsummed = sum(header) - sum(header[_TAR_SUM_AT : _TAR_SUM_AT + _TAR_SUM_BYTES])
    return int(digits, 8) == unsummed + _TAR_SUM_BYTES * ord(" ")


def _tar_kind(start: bytes) -> str:
    first = start[:100].rstrip(b"\0").lower()
    if first.endswith(b".ovf"):
        return f"an OVA (a tar file of a virtual machine): {_PACKED}; its disks need qemu-img"
    if first.startswith((b"./", b"etc/")):
        return (
            "a tar file that looks like a container's backup (vzdump-lxc): it holds files and no "
            "disks; restore it with pct restore or tar"
        )
    return f"a tar file, as a container's backup (vzdump-lxc) is; if an archive is in it, {_PACKED}"


def _text_kind(start: bytes) -> str | None:
    """HTML, a manifest, any other text."""
    if not _is_text(start):
        return None
    text = start[:_TEXT_LOOK_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml") and b"ovf" in start[:4096].lower():
        return "an OVF description of a virtual machine: its disks are in files of their own"
    for beginnings, kind in _TEXTS:
        if text.startswith(beginnings):
            return kind
    return "a text, and no archive"


def _is_text(start: bytes) -> bool:
    look = start[:_TEXT_LOOK_BYTES]
    if not look or any((byte < 32 and byte not in _TEXT_CONTROLS) or byte == 127 for byte in look):
        return False
    try:
        look.decode()
    except UnicodeDecodeError as error:
        # The last character may be cut in two.
        return len(look) - error.start < _MAX_UTF8_BYTES and len(start) > len(look)
    return True
