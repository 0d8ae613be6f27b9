# SPDX-License-Identifier: Apache-2.0
"""LVM2: the label of a physical volume, and the text that says what lies where. Pure.

Layout: lib/format_text in LVM2's source. Of several copies the newest that is whole counts.
Logical volumes of linear and striped segments can be mapped; of others the kind is known.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from vmapipe.access.files.sources import ByteSource

_SECTOR_BYTES = 512
_LABEL_SECTORS = 4
_CHECKSUM_START = 0xF597A6CF
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA_HEADER_BYTES = 512
_IGNORED_AREA = 1
# An area has 1 MiB by default; groups of thousands of volumes have some more of text.
_MAX_TEXT_BYTES = 16 << 20
_MAX_DEPTH = 16
_MAX_VOLUMES = 4096
_MAX_SEGMENTS = 1 << 17
_MAX_STRIPES = 128
_NAME = re.compile(r"[A-Za-z0-9+_.-]{1,127}\Z")
_TOKEN = re.compile(
    r"""\s*(?:\#[^\n]*\s*)*(?:
        (?P<string>"(?:[^"\\]|\\.)*")
        |(?P<number>-?\d{1,20}(?:\.\d+)?)(?![\w.+-])
        |(?P<word>[A-Za-z0-9+_./-]+)
        |(?P<mark>[{}\[\]=,])
        |(?P<end>\0*\Z))""",
    re.VERBOSE | re.DOTALL,
)


class LvmError(Exception):
    """Not what LVM2 writes there: damaged, or made to deceive."""


class Label(NamedTuple):
    """A physical volume's own: its id, and the group's descriptions that it holds, if any."""

    uuid: str
    groups: tuple[VolumeGroup, ...]
    problem: str  # empty, or why there are fewer of them than there should be


class Stripe(NamedTuple):
    """A place in a physical volume, in bytes."""

    pv_uuid: str
    offset: int


class VolumeSegment(NamedTuple):
    """A stretch of a logical volume, in bytes."""

    start: int
    length: int
    stripes: tuple[Stripe, ...]
    stripe_bytes: int


class LogicalVolume(NamedTuple):
    """`kind`: empty for one of these segments; else what it is in place of that."""

    name: str
    size_bytes: int
    kind: str
    segments: tuple[VolumeSegment, ...]


class VolumeGroup(NamedTuple):
    """One description of a group; the one with the largest number is the latest."""

    name: str
    uuid: str
    number: int
    pv_uuids: frozenset[str]
    volumes: tuple[LogicalVolume, ...]


# --- the label, and where the text is ---


def read_label(source: ByteSource) -> Label | None:
    """None: this is not a physical volume. Raises OSError, LvmError."""
    raw = source.read(0, _LABEL_SECTORS * _SECTOR_BYTES)
    for at in range(0, len(raw) - _SECTOR_BYTES + 1, _SECTOR_BYTES):
        sector = raw[at : at + _SECTOR_BYTES]
        if sector[:8] == b"LABELONE" and sector[24:32] == b"LVM2 001":
            return _parse_label(source, sector)
    return None


def _parse_label(source: ByteSource, sector: bytes) -> Label:
    checksum, start = struct.unpack_from("<II", sector, 16)
    if _checksum(sector[20:]) != checksum or not 32 <= start <= _SECTOR_BYTES - 40:
        raise LvmError("its label is damaged")
    uuid = sector[start : start + 32].decode("ascii", "replace")
    places = iter(_locations(sector, start + 40))
    for _ in iter(lambda: next(places, (0, 0)), (0, 0)):
        pass  # areas of data; the text has their places, too
    groups, problem = [], ""
    for offset, size in iter(lambda: next(places, (0, 0)), (0, 0)):
        try:
            found = _parse_area(source, offset, size)
        except LvmError as error:
            problem = str(error)
        else:
            groups += [] if found is None else [found]
    return Label(uuid, tuple(groups), problem)


def _locations(sector: bytes, at: int) -> Iterator[tuple[int, int]]:
    while at + 16 <= len(sector):
        yield struct.unpack_from("<QQ", sector, at)
        at += 16


def _parse_area(source: ByteSource, offset: int, size: int) -> VolumeGroup | None:
    """None: there is no text in it. The text goes round: behind the area's end is its begin."""
    raw = source.read(offset, _AREA_HEADER_BYTES)
    if len(raw) < _AREA_HEADER_BYTES or raw[4:20] != _AREA_MAGIC:
        raise LvmError("its metadata area has no header")
    checksum, version, start, area = struct.unpack_from("<I16xIQQ", raw)
    if _checksum(raw[4:]) != checksum or version != 1 or start != offset or area > size:
        raise LvmError("the header of its metadata area is damaged")
    at, length, text_sum, flags = struct.unpack_from("<QQII", raw, 40)
    if not length or flags & _IGNORED_AREA:
        return None
    if not _AREA_HEADER_BYTES <= at < area or length > min(area, _MAX_TEXT_BYTES):
        raise LvmError("its metadata lie outside their area")
    first = min(length, area - at)
    text = source.read(offset + at, first)
    text += source.read(offset + _AREA_HEADER_BYTES, length - first)
    if len(text) < length or _checksum(text) != text_sum:
        raise LvmError("its metadata are damaged")
    return parse_group(text)


def _checksum(raw: bytes) -> int:
    """CRC-32 with another start, and not inverted at the end."""
    return zlib.crc32(raw, _CHECKSUM_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


# --- the text ---


def parse_text(text: str) -> dict[str, Any]:
    """Sections as dictionaries, lists, numbers and strings. Raises LvmError."""
    top: dict[str, Any] = {}
    sections, at, name = [top], 0, ""
    while True:
        at, kind, word = _token(text, at)
        if kind == "end":
            break
        if word == "}" and not name:
            if len(sections) == 1:
                raise LvmError("its metadata close a section too many")
            sections.pop()
        elif kind in ("word", "number", "string") and not name:
            name = word.strip('"')
        elif word == "{" and name:
            if len(sections) > _MAX_DEPTH:
                raise LvmError("its metadata are too deep")
            inner: dict[str, Any] = {}
            sections[-1][name] = inner
            sections.append(inner)
            name = ""
        elif word == "=" and name:
            at, sections[-1][name] = _value(text, at)
            name = ""
        else:
            raise LvmError("its metadata are not of the form that LVM2 writes")
    if name or len(sections) > 1:
        raise LvmError("its metadata end too early")
    return top


def _token(text: str, at: int) -> tuple[int, str, str]:
    found = _TOKEN.match(text, at)
    if found is None or found.lastgroup is None:
        raise LvmError("its metadata are not of the form that LVM2 writes")
    return found.end(), found.lastgroup, found[found.lastgroup]


def _value(text: str, at: int) -> tuple[int, Any]:
    at, kind, word = _token(text, at)
    if word != "[":
        return at, _scalar(kind, word)
    items: list[Any] = []
    while True:
        at, kind, word = _token(text, at)
        if word == "]":
            return at, items
        if word == ",":
            continue
        items.append(_scalar(kind, word))


def _scalar(kind: str, word: str) -> Any:
    if kind == "number":
        return float(word) if "." in word else int(word)
    if kind == "string":
        return re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL)
    if kind == "word":
        return word
    raise LvmError("its metadata have no value where one should be")


# --- what the text means ---


def parse_group(raw: bytes) -> VolumeGroup:
    """Raises LvmError."""
    top = parse_text(raw.decode("utf-8", "replace"))
    groups = [(name, value) for name, value in top.items() if isinstance(value, dict)]
    if len(groups) != 1:
        raise LvmError("its metadata describe no volume group")
    name, group = groups[0]
    extent_bytes = _number(group, "extent_size") * _SECTOR_BYTES
    if not 0 < extent_bytes < 1 << 48:
        raise LvmError("its metadata have impossible sizes")
    pvs = {
        key: (_uuid(pv), _number(pv, "pe_start") * _SECTOR_BYTES)
        for key, pv in _sections(group, "physical_volumes")
    }
    volumes = _sections(group, "logical_volumes")
    if len(volumes) > _MAX_VOLUMES:
        raise LvmError(f"it has more than {_MAX_VOLUMES} logical volumes")
    stores = {
        str(value.get("cow_store"))
        for _, volume in volumes
        for value in volume.values()
        if isinstance(value, dict)
    }
    budget = [_MAX_SEGMENTS]
    return VolumeGroup(
        _name(name),
        _uuid(group),
        _number(group, "seqno"),
        frozenset(uuid for uuid, _ in pvs.values()),
        tuple(
            # The volume that a snapshot's changes are kept in has the snapshot's name.
            _volume(key, volume, pvs, extent_bytes, budget, "snapshot" if key in stores else "")
            for key, volume in volumes
            if "VISIBLE" in _list(volume, "status")
        ),
    )


_Pvs = dict[str, tuple[str, int]]  # by the text's name for it: id, offset of its first extent


def _volume(
    name: str, volume: dict[str, Any], pvs: _Pvs, extent_bytes: int, budget: list[int], kind: str
) -> LogicalVolume:
    rows = [row for key, row in volume.items() if key.startswith("segment") and _is_section(row)]
    budget[0] -= len(rows)
    if budget[0] < 0 or len(rows) != _number(volume, "segment_count"):
        raise LvmError(f"it counts the segments of {_name(name)} wrong")
    segments, end = [], 0
    for row in sorted(rows, key=lambda row: _number(row, "start_extent")):
        start, count = _number(row, "start_extent"), _number(row, "extent_count")
        if start != end or not 0 < count < 1 << 40:
            raise LvmError(f"the segments of {_name(name)} do not follow each other")
        end += count
        what = str(row.get("type"))
        stripes = _stripes(row, pvs, extent_bytes) if what in ("striped", "linear") else None
        if stripes is None:
            kind = kind or (what if _NAME.match(what) else "unknown")
            continue
        stripe_bytes = _number(row, "stripe_size") * _SECTOR_BYTES if len(stripes) > 1 else 0
        if len(stripes) > 1 and (not stripe_bytes or count % len(stripes)):
            raise LvmError(f"the stripes of {_name(name)} have impossible sizes")
        segments.append(
            VolumeSegment(start * extent_bytes, count * extent_bytes, stripes, stripe_bytes)
        )
    return LogicalVolume(_name(name), end * extent_bytes, kind, () if kind else tuple(segments))


def _stripes(row: dict[str, Any], pvs: _Pvs, extent_bytes: int) -> tuple[Stripe, ...] | None:
    """None: it lies on another logical volume, which is being moved."""
    words = _list(row, "stripes")
    if len(words) % 2 or not 0 < len(words) // 2 <= _MAX_STRIPES:
        raise LvmError("its metadata have a segment without a place")
    found = []
    for pv, extent in zip(words[::2], words[1::2], strict=True):
        if not isinstance(extent, int) or not 0 <= extent < 1 << 40:
            raise LvmError("its metadata have a segment without a place")
        if pv not in pvs:
            return None
        uuid, base = pvs[pv]
        found.append(Stripe(uuid, base + extent * extent_bytes))
    return tuple(found)


def _is_section(value: Any) -> bool:
    return isinstance(value, dict)


def _sections(section: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    inner = section.get(name, {})
    rows = list(inner.items()) if isinstance(inner, dict) else []
    return [(key, value) for key, value in rows if isinstance(value, dict)]


def _list(section: dict[str, Any], name: str) -> list[Any]:
    value = section.get(name)
    return value if isinstance(value, list) else [value]


def _number(section: dict[str, Any], name: str) -> int:
    value = section.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise LvmError(f"its metadata have no {name}")
    return value


def _name(word: str) -> str:
    if not _NAME.match(word):
        raise LvmError("its metadata have a name that LVM2 does not allow")
    return word


def _uuid(section: dict[str, Any]) -> str:
    word = str(section.get("id")).replace("-", "")
    if not re.fullmatch(r"[A-Za-z0-9!#]{32}", word):
        raise LvmError("its metadata have an id that LVM2 does not write")
    return word
