# SPDX-License-Identifier: Apache-2.0
"""The reference tool's map: which device of an archive goes where. Pure.

    [format=F:][throttling.bps=N:][throttling.group=G:][cache=MODE:](0|1):DEVNAME=PATH
    skip=DEVNAME

a line each, until `done`, an empty line or the end. 0: the target reads as
zero already; 1: write the zeroes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from vmapipe.runtime.errors import UsageError

# The reference tool's own buffer; it takes no longer line.
MAX_LINE_CHARS = 8191
_OPTIONS = ("format", "throttling.bps", "throttling.group", "cache")
_CACHE_MODES = ("writeback", "writethrough", "none", "directsync", "unsafe")
# What QEMU can make, and write to.
IMAGE_FORMATS = ("raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
_MAX_NUMBER = (1 << 64) - 1


class MapError(UsageError):
    """The map makes no sense; the text is the reference tool's."""


class MapEntry(NamedTuple):
    """A line of the map. `bytes_per_s` is 0 without a limit; with `skip` the rest means nothing.

    `image_format`: what stands in the line; empty: nothing.
    """

    path: str = ""
    write_zeroes: bool = True
    bytes_per_s: int = 0
    throttling_group: str = ""
    skip: bool = False
    image_format: str = ""


def parse_map(lines: Iterable[str]) -> dict[str, MapEntry]:
    """The entries by device name. Takes no line behind the map's end. Raises MapError."""
    entries: dict[str, MapEntry] = {}
    for raw in lines:
        line = raw.removesuffix("\n")
        if line in ("", "done"):
            break
        if len(line) > MAX_LINE_CHARS:
            raise _failed(f"parse error ('{line[:100]}')")
        name, entry = _parse_line(line)
        if name in entries:
            # The reference lets the last one win: a disk would be missing unnoticed.
            raise _failed(f"device '{name}' is mapped twice")
        entries[name] = entry
    return entries


def _failed(what: str) -> MapError:
    return MapError(f"read map failed - {what}")


def _parse_line(line: str) -> tuple[str, MapEntry]:
    if line.startswith("skip"):
        name = line.removeprefix("skip=")
        if not name or name == line:
            raise _failed(f"option 'skip' has no value ('{line}')")
        return name, MapEntry(skip=True)
    options, rest = _parse_options(line)
    if not rest.startswith(("0:", "1:")):
        raise _failed(f"parse error ('{line}')")
    name, equals, path = rest[2:].partition("=")
    if not equals or not name:
        raise _failed(f"no dev name specified ('{line}')")
    if not path:
        raise _failed(f"parse error ('{line}')")
    _check_format(options.get("format"), name)
    if options.get("cache", "writeback") not in _CACHE_MODES:
        raise MapError(f"invalid cache option: {options['cache']}")
    return name, MapEntry(
        path=path,
        write_zeroes=rest.startswith("1:"),
        bytes_per_s=_number(options.get("throttling.bps", "0")),
        throttling_group=options.get("throttling.group", ""),
        image_format=options.get("format", ""),
    )


def _parse_options(line: str) -> tuple[dict[str, str], str]:
    """The options in front, in any order, and what follows them."""
    options: dict[str, str] = {}
    rest = line
    while True:
        name = next((o for o in _OPTIONS if rest.startswith(f"{o}=")), None)
        if name is None:
            return options, rest
        if name in options:
            raise _failed(f"duplicate value for option '{name}'")
        value, colon, after = rest[len(name) + 1 :].partition(":")
        if not colon:
            raise _failed(f"option '{name}' not terminated ('{line}')")
        options[name] = value
        rest = after


def _check_format(image_format: str | None, name: str) -> None:
    if image_format and image_format not in IMAGE_FORMATS:
        raise MapError(
            f"device '{name}': restoring to format '{image_format}' is not available, "
            f"only to {', '.join(IMAGE_FORMATS)}"
        )


def _number(text: str) -> int:
    """Parse a number like strtoull with base 0: decimal, 0x hexadecimal or 0 octal."""
    value = -1
    if re.fullmatch(r"0[0-7]*", text):
        value = int(text, 8)
    elif re.fullmatch(r"[1-9][0-9]{0,19}|0[xX][0-9a-fA-F]{1,16}", text):
        value = int(text, 0)
    if not 0 <= value <= _MAX_NUMBER:
        raise _failed(f"not a number: {text}")
    return value
