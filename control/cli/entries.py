# SPDX-License-Identifier: Apache-2.0
"""Entries of file systems as `vmapipe files ls` and `find` print them, and which of them."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from collections.abc import Callable

from vmapipe.access.files.messages import LINK, Entry
from vmapipe.runtime.text import escaped

_MODES = "-dlcbps"


def entry_filter(options: argparse.Namespace) -> Callable[[bytes], bool]:
    """Whether a path is of the names that were asked for, or all are."""
    globs = [(os.fsencode(glob), b"/" in os.fsencode(glob)) for glob in options.name]
    folded = [(glob.casefold(), "/" in glob) for glob in options.iname]

    def is_wanted(path: bytes) -> bool:
        name = path.rpartition(b"/")[2]
        return (
            not (globs or folded)
            or any(
                fnmatch.fnmatchcase(path if has_folder else name, glob)
                for glob, has_folder in globs
            )
            or any(
                fnmatch.fnmatchcase(os.fsdecode(path if has_folder else name).casefold(), glob)
                for glob, has_folder in folded
            )
        )

    return is_wanted


def print_entry(entry: Entry, path: bytes, options: argparse.Namespace) -> None:
    """Print `path`, as the options have it. Whoever asked for it flushes."""
    if options.json:
        print(json.dumps(_as_json(entry)))
    elif options.null:
        sys.stdout.buffer.write(path + b"\0")
    elif options.long:
        print(_long_line(entry, path))
    else:
        print(_for_people(path))


def _for_people(path: bytes) -> str:
    """Escaped, so that no name moves the cursor or passes for two."""
    return escaped(path.decode("utf-8", "backslashreplace"))


def _as_json(entry: Entry) -> dict[str, object]:
    """Bytes that are not UTF-8 are lone surrogates (PEP 383): os.fsencode gives them back."""
    pairs = zip(entry.xattrs[::2], entry.xattrs[1::2], strict=False)
    return {
        "path": os.fsdecode(entry.path),
        "type": ("file", "folder", "link", "character", "block", "fifo", "socket")[entry.kind],
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "bytes": entry.size_bytes,
        "mtime_ns": entry.mtime_ns,
        "inode": entry.inode,
        "links": entry.links,
        "target": os.fsdecode(entry.target) if entry.kind == LINK else None,
        "xattrs": {os.fsdecode(key): value.hex() for key, value in pairs},
    }


def _long_line(entry: Entry, path: bytes) -> str:
    """A line as `ls -l` has it, but with setuid, setgid and sticky as u, g and t behind the mode."""
    name = _for_people(path)
    if entry.kind == LINK:
        name += f" -> {_for_people(entry.target)}"
    if entry.device:
        size = f"{os.major(entry.device)},{os.minor(entry.device)}"
    else:
        size = str(entry.size_bytes)
    owner = f"{entry.uid}:{entry.gid}"
    mode = f"{_MODES[entry.kind]}{_mode_letters(entry.mode)}"
    return f"{mode} {owner:<11} {size:>12} {_time_text(entry.mtime_ns)} {name}"


def _mode_letters(mode: int) -> str:
    rights = "".join(
        letter if mode >> (8 - at) & 1 else "-" for at, letter in enumerate("rwxrwxrwx")
    )
    special = "".join(
        letter for bit, letter in ((0o4000, "u"), (0o2000, "g"), (0o1000, "t")) if mode & bit
    )
    return f"{rights}{special:<2}"


def _time_text(mtime_ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(mtime_ns / 1e9))
    except (OverflowError, ValueError, OSError):
        return "?"
