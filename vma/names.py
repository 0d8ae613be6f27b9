# SPDX-License-Identifier: Apache-2.0
"""Names in an archive: Proxmox VE's own, and a check before any touches a file system."""

from __future__ import annotations

from vmapipe.vma.errors import HeaderError

# What Proxmox VE calls the configurations of a machine in an archive.
CONFIG_NAME = "qemu-server.conf"
FIREWALL_NAME = "qemu-server.fw"
# What Linux file systems take as one component, in bytes.
_MAX_COMPONENT_BYTES = 255


def safe_file_name(name: str, what: str, *, prefix: str = "", suffix: str = "") -> str:
    """`prefix + name + suffix` as a name inside one folder. Raises HeaderError if it is not one.

    An archive comes from anywhere: a name with a slash, `..`, or a control
    character is an attack or damage, and is refused rather than mended.
    """
    file_name = prefix + name + suffix
    try:
        raw = file_name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise HeaderError(f"{what} has a name that is not valid UTF-8: {name!r}") from error
    if is_unsafe(name):
        raise HeaderError(f"{what} has the unsafe name {name!r}: refusing to write a file for it")
    if len(raw) > _MAX_COMPONENT_BYTES:
        raise HeaderError(f"{what} has a name too long for a file: {name!r}")
    return file_name


def is_unsafe(name: str) -> bool:
    """Return whether no file may have this name: empty, `.`, `..`, or with a slash or control character."""
    return name in ("", ".", "..") or "/" in name or any(_is_control(ord(c)) for c in name)


def _is_control(code: int) -> bool:
    # C0, DEL and C1: a terminal obeys all of them.
    return code < 32 or 127 <= code < 160


def printable(name: str) -> str:
    """The name for a terminal or a log: control characters and stray bytes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
