# SPDX-License-Identifier: Apache-2.0
"""`--disk` of a disk at rest: its name, its path, and how to read it."""

from __future__ import annotations

import argparse
import os
import re
import stat

from vmapipe.control.job import Disk
from vmapipe.runtime.arguments import size, split_named
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.image_format import format_of_content

# What may follow an image's path, and what a format's name looks like.
_READING = ("format", "snapshot", "offset", "others")
_WORD = re.compile(r"[a-z0-9][a-z0-9-]*")


def parse_disk(text: str) -> Disk:
    """`[NAME=]PATH[,format=FORMAT][,snapshot=NAME][,offset=BYTES][,others=yes]`. Raises UsageError."""
    body, found = text, dict[str, str]()
    while True:
        rest, comma, last = body.rpartition(",")
        key, equals, value = last.partition("=")
        if not comma or not equals or key not in _READING:
            break
        body = rest
        if key in found:
            raise UsageError(f"{text}: {key} comes twice")
        found[key] = value
    disk = Disk(*split_named(body))
    if "format" in found:
        if not _WORD.fullmatch(found["format"]):
            raise UsageError(f"{text}: {found['format']!r} is no format")
        return Disk(disk.name, disk.path, reading=_reading_words(text, found))
    if found:
        raise UsageError(f"{text}: say the format, too: {body},format=qcow2,…")
    if "://" in disk.path:
        raise UsageError(f"{text}: say what is there: {text},format=raw (or qcow2, …)")
    image_format = _looks_like(disk.path)
    if image_format:
        raise UsageError(
            f"{disk.path} looks like a {image_format} image, which a guest can write into its raw "
            f"disk: say {text},format=raw if the disk is raw, or {text},format={image_format} if "
            "you know that it was made as such an image"
        )
    return disk


def _reading_words(text: str, found: dict[str, str]) -> tuple[str, ...]:
    words = [f"--format={found['format']}"]
    if "snapshot" in found:
        words.append(f"--snapshot={found['snapshot']}")
    if "others" in found:
        if found["others"] not in ("yes", "no"):
            raise UsageError(f"{text}: others is yes or no, not {found['others']!r}")
        words += ["--others"] * (found["others"] == "yes")
    if "offset" in found:
        try:
            words.append(f"--offset={size(found['offset'])}")
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{text}: {error}") from error
    return tuple(words)


def _looks_like(path: str) -> str:
    """The format of an image that is not raw, by its content; empty: raw, or unreadable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""  # the producer will say what is wrong
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
            return ""
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        found = format_of_content(lambda offset, length: os.pread(fd, length, offset), size_bytes)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return found.driver if found is not None else ""
