# SPDX-License-Identifier: Apache-2.0
"""The values of fleet.toml: what each option takes, and words for the user about what it does not. Pure.

Each reader returns the value as the inventory has it, or raises ValueError.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Callable, Mapping
from typing import Any

from vmapipe.fleet.windows import parse_interval, parse_window
from vmapipe.runtime.arguments import size

#: A name of a host or a target: a part of folders' names, too.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
# USER@HOST, or ssh://USER@HOST:PORT; a dash at the begin of either would be an option of ssh's.
_SSH = re.compile(
    r"(?:ssh://)?(?:[A-Za-z0-9_][A-Za-z0-9_.+@-]*@)?"
    r"(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[A-Za-z0-9_:][A-Za-z0-9_.:%-]*)(?::\d{1,5})?/?"
)
_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_COMPRESS = re.compile(r"none|zstd(?::(?:[1-9]|1[0-9]))?")
_TIME_MS = re.compile(r"[1-9][0-9]{0,4}(?:ms|s)")
_IONICE = re.compile(r"idle|best-effort:[0-7]")


def _text(value: object, example: str = "") -> str:
    if not isinstance(value, str) or "\0" in value or "\n" in value:
        such = f', such as "{example}"' if example else ""
        raise ValueError(f"it has to be a text of one line, in quotes{such}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it has to be true or false")
    return value


def _number(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"it has to be a whole number from {least} to {most}")
        return value

    return read


def _like(pattern: re.Pattern[str], example: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        text = _text(value, example.partition(",")[0])
        if not pattern.fullmatch(text):
            raise ValueError(f"{text!r} is not valid here; for example: {example}")
        return text

    return read


def _texts(value: object, example: str = "") -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    found = tuple(_text(word, example) for word in listed)
    if any(word.startswith("-") or not word for word in found):
        raise ValueError("none of them may be empty or begin with a dash")
    return found


def _windows(value: object) -> Any:
    return tuple(map(parse_window, _texts(value, "22:00-06:00")))


def _disks(value: object) -> tuple[str, ...]:
    found = _texts(value, "vda")
    for name in found:
        if re.search(r"[,=\s]", name):
            raise ValueError(f'{name!r} is not a disk\'s name; several are a list: ["vda", "vdb"]')
    return found


def _interval(value: object) -> float:
    return parse_interval(_text(value, "1d"))


def _ssh(value: object) -> str:
    text = _like(_SSH, "root@pve1, ssh://root@pve1:2222")(value)
    if re.fullmatch(r"[^:]+:\d+", text):
        raise ValueError(f"a port is said in an address: ssh://{text}")
    return text


def _archiver(value: object) -> str:
    text = _like(re.compile(r"tcp://[^\s/]+:\d{1,5}"), "tcp://b1:7777")(value)
    if not 0 < int(text.rpartition(":")[2]) < 1 << 16:
        raise ValueError(f"{text!r} has a port that there is not")
    return text


def _database(value: object) -> str:
    text = _text(value, "postgresql://vmapipe@b1/fleet")
    if not re.match(r"postgres(?:ql)?://|\w+ *=", text):
        raise ValueError(f"{text!r} is not like postgresql://vmapipe@b1/fleet")
    return text


def _directory(value: object) -> str:
    text = _path(value)
    for word in re.findall(r"\{[^}]*\}?", text):
        if word != "{host}":
            raise ValueError(f"{word!r} is not known: {{host}} alone stands for something")
    return text


def _interval_or_never(value: object) -> float:
    return 0.0 if value in ("never", 0, False) else _interval(value)


def _zone(value: object) -> str:
    try:
        return zoneinfo.ZoneInfo(_text(value)).key
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"{value!r} is not a time zone that this host knows, such as Europe/Berlin"
        ) from None


def _keep(value: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, dict) or not value or set(value) - set(_RULES):
        raise ValueError(f"it has to be like {{ last = 3, daily = 7 }}, of {', '.join(_RULES)}")
    found = tuple((rule, _number(0, 10**6)(value[rule])) for rule in _RULES if rule in value)
    if not any(count for _, count in found):
        raise ValueError("it keeps nothing at all; left out, everything is kept")
    return found


def _size(value: object) -> str:
    text = _text(value)
    try:
        found = size(text)
    except Exception as error:
        raise ValueError(str(error)) from error
    # As jobs may have it, however it is spelt here: 10 MiB, 1e6.
    return text if re.fullmatch(r"[0-9]{1,12}[KMGT]?", text) else str(found)


def _path(value: object) -> str:
    text = _text(value)
    if not text.startswith("/") or "/../" in f"{text}/":
        raise ValueError(f"{text!r} is not an absolute path without ..")
    return text.rstrip("/") or "/"


def _s3(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,62}(?:/[^\s]*)?", text):
        raise ValueError(f"{text!r} is not like s3://BUCKET/PREFIX")
    return text.rstrip("/")


def _guests(value: object) -> tuple[str, ...]:
    found = _texts(value)
    for word in found:
        kind, _, pattern = word.partition(":")
        if word not in ("proxmox", "libvirt") and not (
            kind in ("qmp", "disks") and pattern.startswith("/")
        ):
            raise ValueError(
                f"{word!r} is not a way to find machines: proxmox, libvirt, qmp:/run/vm/*.qmp, "
                "disks:/srv/*.raw"
            )
    return found


#: The options of a table: the field of the inventory that each fills, and its reader.
Values = Mapping[str, tuple[str, Callable[[object], Any]]]

POLICY: Values = {
    "every": ("every_s", _interval),
    "window": ("window", _windows),
    "work_window": ("work_window", _windows),
    "time_zone": ("time_zone", _zone),
    "target": ("target", _text),
    "keep": ("keep", _keep),
    "verify_every": ("verify_every_s", _interval_or_never),
    "drill_every": ("drill_every_s", _interval_or_never),
    "drill": ("drill", _path),
    "priority": ("priority", _number(-1000, 1000)),
    "disks": ("disks", _disks),
    "exclude": ("exclude", _disks),
    "not_together": ("not_together", _text),
    "skip": ("skip", _text),
    "compress": ("compress", _like(_COMPRESS, "zstd, zstd:9, none")),
    "base": ("base", _like(re.compile("auto|none"), "auto, none")),
    "guest_latency": ("guest_latency", _like(_TIME_MS, "20ms")),
    "speed": ("speed", _size),
    "nice": ("nice", _number(-20, 19)),
    "ionice": ("ionice", _like(_IONICE, "idle, best-effort:7")),
    "freeze": ("freeze", _flag),
    "time_limit": ("time_limit_s", _interval),
}
HOST: Values = {
    "ssh": ("ssh", _ssh),
    "jobs": ("jobs", _number(0, 1000)),
    "drills": ("drills", _number(0, 100)),
    "guests": ("guests", _guests),
    "command": ("command", _texts),
    "prefix": ("prefix", _like(PLAIN_NAME, "pve1-")),
}
TARGET: Values = {
    "archiver": ("archiver", _archiver),
    "keys": ("keys", _path),
    "directory": ("directory", _directory),
    "s3": ("s3", _s3),
    "host": ("host", _text),
    "jobs": ("jobs", _number(0, 1000)),
    "copy_from": ("copy_from", _text),
    "lock": ("lock", _like(re.compile(r"[1-9][0-9]{0,4}d"), "30d")),
    "keep": ("keep", _keep),
}
ANSIBLE: Values = {
    "inventory": ("inventory", _path),
    "group": ("group", _text),
    **{k: HOST[k] for k in ("jobs", "drills", "guests", "command")},
}
STORAGE: Values = {"jobs": ("jobs", _number(0, 1000))}
LIMITS: Values = {"total": ("total", _number(0, 100_000))}
GENERAL: Values = {"database": ("database", _database), "catalogue": ("catalogue", _path)}
