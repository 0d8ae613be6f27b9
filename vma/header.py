# SPDX-License-Identifier: Apache-2.0
"""The archive header: devices, configs, uuid and time (docs/vma-format.md).

Everything is big endian except the 16-bit length in front of each blob, which is little
endian: that is what the reference tool writes and reads.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.clusters.sizes import MAX_DEVICE_BYTES, VMSTATE_NAME, cluster_count
from vmapipe.vma.errors import HeaderError, LimitError, NotAnArchiveError
from vmapipe.vma.names import is_unsafe

VMA_MAGIC = b"VMA\0"
VMA_VERSION = 1
UUID_BYTES = 16
# The time of the backup is a signed 64-bit field.
MAX_CTIME_S = (1 << 63) - 1
HEADER_BYTES = 12288
# The reference tool refuses larger headers, blob table included.
MAX_HEADER_BYTES = 8 * 65536
# A blob's length is a 16-bit field.
MAX_BLOB_BYTES = 65535
MAX_CONFIGS = 256
# dev_id 0 marks an unused slot, 255 is reserved.
MAX_DEVICES = 254


class BlobTable:
    """Collects blobs; positions start at 1 because 0 means "none"."""

    def __init__(self) -> None:
        self.data = bytearray(1)

    def add(self, blob: bytes) -> int:
        position = len(self.data)
        self.data += struct.pack("<H", len(blob)) + blob
        return position


def name_bytes(name: str, what: str) -> bytes:
    """A device or config name as stored: UTF-8, undecodable bytes kept, a NUL at the end.

    Raises LimitError when the format cannot hold the name.
    """
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise LimitError(f"{what} name {name!r} is not valid text") from error
    if not raw:
        raise LimitError(f"{what} has an empty name")
    if b"\0" in raw:
        raise LimitError(f"{what} name {name!r} contains a NUL byte")
    if len(raw) >= MAX_BLOB_BYTES:
        raise LimitError(f"{what} name is {len(raw)} bytes long; the limit is {MAX_BLOB_BYTES - 1}")
    return raw + b"\0"


class BlobReader:
    """Takes blobs out of the table.

    Two names may share a blob, and then share it here; blobs that overlap are
    a lie that would make many times its size out of a header, and are refused.
    """

    def __init__(self, table: bytes, offset: int) -> None:
        self._table = table
        self._offset = offset
        self._left = len(table)
        self._blobs: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def blob(self, pointer: int, what: str) -> bytes:
        if pointer in self._blobs:
            return self._blobs[pointer]
        start = pointer + 2
        if start > len(self._table):
            raise HeaderError(f"{what} points outside the blob table", offset=self._offset)
        (length,) = struct.unpack_from("<H", self._table, pointer)
        blob = self._table[start : start + length]
        if len(blob) < length:
            raise HeaderError(f"{what} is cut off in the blob table", offset=self._offset + pointer)
        self._left -= 2 + length
        if self._left < 0:
            raise HeaderError(
                f"{what} overlaps others in the blob table", offset=self._offset + pointer
            )
        self._blobs[pointer] = blob
        return blob

    def name(self, pointer: int, what: str) -> str:
        if pointer not in self._names:
            raw = self.blob(pointer, what)
            if len(raw) < 2 or raw[-1] != 0 or 0 in raw[:-1]:
                raise HeaderError(
                    f"{what} is not a valid name (no NUL at its end)", offset=self._offset + pointer
                )
            self._names[pointer] = raw[:-1].decode("utf-8", "surrogateescape")
        return self._names[pointer]


# magic, version, uuid, ctime, md5, blob_buffer_offset, blob_buffer_size, header_size
_FIXED = struct.Struct(">4sI16sq16sIII")
_MD5_AT = 32
_CONFIG_NAMES_AT = 2044
_CONFIG_DATA_AT = 3068
_DEVICES_AT = 4096
_POINTERS = struct.Struct(">256I")
# devname_ptr, reserved, size, 2 x reserved
_DEVICE = struct.Struct(">IIQQQ")
_NO_MD5 = bytes(16)

#: Bytes that `peek_header_bytes` needs.
PEEK_BYTES = _FIXED.size


class Device(NamedTuple):
    """One disk, or the machine's memory: `size_bytes` is exact, or for vmstate an estimate."""

    dev_id: int
    name: str
    size_bytes: int

    @property
    def is_vmstate(self) -> bool:
        return self.name == VMSTATE_NAME

    @property
    def clusters(self) -> int:
        return cluster_count(self.size_bytes)


class Config(NamedTuple):
    """A named blob, for instance the machine's configuration file."""

    name: str
    data: bytes


class Header(NamedTuple):
    """Everything that stands before the first extent. `ctime_s` is Unix time in seconds."""

    uuid: bytes
    ctime_s: int
    devices: tuple[Device, ...]
    configs: tuple[Config, ...]
    header_bytes: int = 0

    def device(self, dev_id: int) -> Device | None:
        return next((d for d in self.devices if d.dev_id == dev_id), None)


def check_contents(devices: tuple[Device, ...], configs: tuple[Config, ...]) -> None:
    """Raise LimitError, naming the culprit, when an archive cannot hold these."""
    if not devices and not configs:
        raise LimitError("nothing to archive: neither a device nor a config")
    if len(devices) > MAX_DEVICES:
        raise LimitError(f"too many drives: {len(devices)}; the limit is {MAX_DEVICES}")
    if len(configs) > MAX_CONFIGS:
        raise LimitError(f"too many configs: {len(configs)}; the limit is {MAX_CONFIGS}")
    _check_names([device.name for device in devices], "device")
    _check_names([config.name for config in configs], "config")
    _check_devices(devices)
    for config in configs:
        if len(config.data) > MAX_BLOB_BYTES:
            raise LimitError(
                f"config {config.name!r} has {len(config.data)} bytes; the limit is "
                f"{MAX_BLOB_BYTES}"
            )


def check_disk_names(names: Sequence[str], others: int = 0) -> None:
    """Raise LimitError for disks that no archive could hold together, beside so many other devices."""
    if VMSTATE_NAME in names:
        raise LimitError(f"the name {VMSTATE_NAME!r} is the memory's; give the disk another one")
    if len(names) + others > MAX_DEVICES:
        raise LimitError(f"too many drives: {len(names)}; the limit is {MAX_DEVICES}")
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            # Archives keep such names; the protocol of producers is UTF-8.
            raise LimitError(f"device name {name!r} is not UTF-8 text; give another: NAME=PATH")
    devices = tuple(Device(index, name, 1) for index, name in enumerate(names, start=1))
    if devices:
        check_contents(devices, ())


def _check_names(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        name_bytes(name, what)
        if "/" in name:
            raise LimitError(f"{what} name {name!r} contains a slash")
        if is_unsafe(name):
            # A restore would refuse to make a file of this name.
            raise LimitError(f"{what} name {name!r} is not safe as the name of a file")
        if name in seen:
            raise LimitError(f"two {what}s have the name {name!r}")
        seen.add(name)


def _check_devices(devices: tuple[Device, ...]) -> None:
    owners: dict[int, str] = {}
    for device in devices:
        if not 1 <= device.dev_id <= MAX_DEVICES:
            raise LimitError(f"device {device.name!r}: dev_id {device.dev_id} is not 1..254")
        if device.dev_id in owners:
            raise LimitError(
                f"devices {owners[device.dev_id]!r} and {device.name!r} "
                f"have the same dev_id {device.dev_id}"
            )
        owners[device.dev_id] = device.name
        if device.size_bytes < 1:
            raise LimitError(f"device {device.name!r} is empty: nothing to back up")
        if device.size_bytes > MAX_DEVICE_BYTES:
            raise LimitError(
                f"device {device.name!r} has {device.size_bytes} bytes; "
                f"the limit is {MAX_DEVICE_BYTES}"
            )


def encode_header(header: Header) -> bytes:
    """The header and blob table as stored; a multiple of 512 bytes.

    Configs come first in the blob table, then device names: the order of the
    reference tool. Raises LimitError.
    """
    if len(header.uuid) != UUID_BYTES:
        raise LimitError(f"an archive's uuid has {UUID_BYTES} bytes, not {len(header.uuid)}")
    if not -MAX_CTIME_S - 1 <= header.ctime_s <= MAX_CTIME_S:
        raise LimitError(f"the time {header.ctime_s} does not fit into 64 bits")
    check_contents(header.devices, header.configs)
    blobs = BlobTable()
    config_names = [0] * 256
    config_data = [0] * 256
    for index, config in enumerate(header.configs):
        config_names[index] = blobs.add(name_bytes(config.name, "config"))
        config_data[index] = blobs.add(config.data)
    raw_devices = bytearray(256 * _DEVICE.size)
    for device in header.devices:
        pointer = blobs.add(name_bytes(device.name, "device"))
        _DEVICE.pack_into(
            raw_devices, device.dev_id * _DEVICE.size, pointer, 0, device.size_bytes, 0, 0
        )
    size = HEADER_BYTES + -(-len(blobs.data) // 512) * 512
    if size > MAX_HEADER_BYTES:
        raise LimitError(
            f"names and configs need a header of {size} bytes; the limit is {MAX_HEADER_BYTES}"
        )
    raw = bytearray(size)
    _FIXED.pack_into(
        raw,
        0,
        VMA_MAGIC,
        VMA_VERSION,
        header.uuid,
        header.ctime_s,
        _NO_MD5,
        HEADER_BYTES,
        len(blobs.data),
        size,
    )
    _POINTERS.pack_into(raw, _CONFIG_NAMES_AT, *config_names)
    _POINTERS.pack_into(raw, _CONFIG_DATA_AT, *config_data)
    raw[_DEVICES_AT : _DEVICES_AT + len(raw_devices)] = raw_devices
    raw[HEADER_BYTES : HEADER_BYTES + len(blobs.data)] = blobs.data
    raw[_MD5_AT : _MD5_AT + 16] = hashlib.md5(raw, usedforsecurity=False).digest()
    return bytes(raw)


def peek_header_bytes(start: bytes | bytearray | memoryview) -> int:
    """How long the whole header is, from its first `PEEK_BYTES` bytes.

    Raises NotAnArchiveError or HeaderError; the result is within the limits,
    so a caller may take memory for it.
    """
    if bytes(start[:4]) != VMA_MAGIC:
        raise NotAnArchiveError("not a vma file - wrong magic number", offset=0)
    if len(start) < PEEK_BYTES:
        raise HeaderError(f"the archive ends inside its header, after {len(start)} bytes", offset=0)
    _, version, _, _, _, _, _, header_bytes = _FIXED.unpack_from(start)
    if not HEADER_BYTES < header_bytes <= MAX_HEADER_BYTES:
        # HEADER_BYTES itself would mean an empty blob table; the reference refuses it, too.
        raise HeaderError(f"wrong vma header size {header_bytes}", offset=56)
    if version != VMA_VERSION:
        raise HeaderError(f"wrong vma version {version}", offset=4)
    return int(header_bytes)


def parse_header(raw: bytes) -> Header:
    """Read a whole header (as many bytes as `peek_header_bytes` says).

    Raises HeaderError where the reference tool would, and where a pointer,
    name or size makes no sense. Reserved bytes may hold anything.
    """
    size = peek_header_bytes(raw)
    if len(raw) < size:
        raise HeaderError(f"the header ends after {len(raw)} of {size} bytes", offset=len(raw))
    body = bytearray(raw[:size])
    _, _, uuid, ctime_s, md5, blob_at, blob_bytes, _ = _FIXED.unpack_from(body)
    body[_MD5_AT : _MD5_AT + 16] = _NO_MD5
    if hashlib.md5(body, usedforsecurity=False).digest() != md5:
        raise HeaderError(
            "the header's checksum is wrong: the header is damaged",
            offset=_MD5_AT,
            reference_text="wrong vma header chechsum",
        )
    # The reference reads the table where the field says; so do we, within the header.
    if blob_at < HEADER_BYTES or blob_at + blob_bytes > size:
        raise HeaderError("the blob table lies outside the header", offset=48)
    blobs = BlobReader(bytes(body[blob_at : blob_at + blob_bytes]), blob_at)
    return Header(
        uuid=uuid,
        ctime_s=ctime_s,
        devices=_parse_devices(body, blobs),
        configs=_parse_configs(body, blobs),
        header_bytes=size,
    )


def _parse_devices(body: bytearray, blobs: BlobReader) -> tuple[Device, ...]:
    devices = []
    for dev_id in range(1, MAX_DEVICES + 1):
        at = _DEVICES_AT + dev_id * _DEVICE.size
        pointer, _, size_bytes, _, _ = _DEVICE.unpack_from(body, at)
        if not pointer or not size_bytes:
            # To the reference tool, too, a device without a size is an unused slot.
            continue
        name = blobs.name(pointer, f"the name of device {dev_id}")
        if size_bytes > MAX_DEVICE_BYTES:
            raise HeaderError(f"device {name!r} claims {size_bytes} bytes", offset=at)
        devices.append(Device(dev_id, name, size_bytes))
    return tuple(devices)


def _parse_configs(body: bytearray, blobs: BlobReader) -> tuple[Config, ...]:
    names = _POINTERS.unpack_from(body, _CONFIG_NAMES_AT)
    datas = _POINTERS.unpack_from(body, _CONFIG_DATA_AT)
    configs = []
    for index, (name_at, data_at) in enumerate(zip(names, datas, strict=True)):
        if not name_at or not data_at:
            continue
        name = blobs.name(name_at, f"the name of config {index}")
        configs.append(Config(name, blobs.blob(data_at, f"config {name!r}")))
    return tuple(configs)
