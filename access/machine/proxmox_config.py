# SPDX-License-Identifier: Apache-2.0
"""Lines and values of a configuration of Proxmox VE (`qemu-server.conf`). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vmapipe.access.machine.spec import MAX_CONFIG_BYTES
from vmapipe.runtime.text import file_lines

_LINE = re.compile(r"([a-zA-Z][a-zA-Z0-9_-]*):\s*(.*)")


def looks_like_proxmox(text: str) -> bool:
    """Tell whether a text has a line that only such a configuration has."""
    wanted = re.compile(r"(?:memory|cores|ostype|scsihw|(?:ide|sata|scsi|virtio|net)\d+):\s*\S")
    return any(wanted.match(line) for line in file_lines(text[:MAX_CONFIG_BYTES]))


def parse_config(text: str) -> dict[str, str]:
    """Return the values of the machine as it is: snapshots and pending changes come behind it."""
    found: dict[str, str] = {}
    for line in file_lines(text[:MAX_CONFIG_BYTES]):
        if line.startswith("["):
            break
        if match := _LINE.fullmatch(line.rstrip()):
            found[match[1]] = match[2]
    return found


class Words(NamedTuple):
    """A value `first,key=value,…`."""

    first: str
    options: Mapping[str, str]


def words_of(value: str, first_key: str = "") -> Words:
    """Return a value's words. `first_key`: the key that may be left out of the first one."""
    first, options = "", dict[str, str]()
    for index, word in enumerate(value.split(",")):
        key, equals, rest = word.strip().partition("=")
        if equals:
            options[key] = rest
        elif not index:
            first = key
    return Words(options.get(first_key, first), options)


def is_on(value: str) -> bool:
    return value in ("1", "on", "yes", "true")
