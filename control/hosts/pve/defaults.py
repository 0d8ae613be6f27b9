# SPDX-License-Identifier: Apache-2.0
"""The defaults of /etc/vzdump.conf, as far as a backup of ours has a use for them. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from vmapipe.runtime.text import file_lines

# What vzdump knows and has no meaning here; said, so that nobody relies on it.
_WITHOUT_USE = {
    "exclude-path": "it is for containers",
    "stdexcludes": "it is for containers",
    "fleecing": "old data waits in memory: --buffer, --guest-wait",
    "lockwait": "a machine that another backup has locked fails at once",
    "mailnotification": "use --hook, or systemd's OnFailure=",
    "mailto": "use --hook, or systemd's OnFailure=",
    "notification-mode": "use --hook, or systemd's OnFailure=",
    "notification-policy": "use --hook, or systemd's OnFailure=",
    "notification-target": "use --hook, or systemd's OnFailure=",
    "pbs-change-detection-mode": "it is for Proxmox Backup Server",
    "performance": "use --speed, --nice, --ionice",
    "pigz": "archives are compressed with zstd",
    "tmpdir": "nothing is copied before it goes into the archive",
}
_MODES = ("snapshot", "suspend", "stop")
_LINE = re.compile(r"([a-z][a-z0-9-]*):\s*(.*?)\s*")
_RULE = re.compile(r"keep-(all|last|hourly|daily|weekly|monthly|yearly)=(\d{1,9})")


class Defaults(NamedTuple):
    """Values of /etc/vzdump.conf; what it does not say is None or empty.

    `remarks`: lines that are not used, with the reason.
    """

    speed_bytes_s: int | None = None
    mode: str = ""
    #: How long a machine may take to shut down.
    stop_minutes: int = 10
    script: str = ""
    storage: str = ""
    dump_folder: str = ""
    compress: str = ""
    threads: int | None = None
    ionice: int | None = None
    notes: str = ""
    is_protected: bool = False
    prune: str = ""
    removes: bool = True
    exclude: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def parse_defaults(text: str) -> Defaults:
    """Return the defaults. Nothing in the file is an error: what is not understood is a remark."""
    found = Defaults()
    remarks = list[str]()
    for number, line in enumerate(file_lines(text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        changed = _with(found, match[1], match[2]) if match else None
        if changed is not None:
            found = changed
        elif match and match[1] in _WITHOUT_USE:
            remarks.append(f"'{match[1]}' has no use here: {_WITHOUT_USE[match[1]]}")
        else:
            remarks.append(f"line {number} is not understood, and not used: {line.strip()[:80]}")
    return found._replace(remarks=tuple(remarks))


def _with(found: Defaults, key: str, value: str) -> Defaults | None:  # noqa: PLR0911, PLR0912  one a key
    """Return the defaults with one more; None: the key or its value is not known."""
    match key:
        case "bwlimit" if value.isdecimal():
            return found._replace(speed_bytes_s=int(value) << 10)
        case "mode" if value in _MODES:
            return found._replace(mode=value)
        case "stopwait" if value.isdecimal() and len(value) < 6:
            return found._replace(stop_minutes=int(value))
        case "script":
            return found._replace(script=value)
        case "storage":
            return found._replace(storage=value)
        case "dumpdir":
            return found._replace(dump_folder=value)
        case "compress" if value in ("0", "1", "gzip", "lzo", "zstd"):
            return found._replace(compress="" if value == "0" else value)
        case "zstd" if value.isdecimal():
            return found._replace(threads=int(value))
        case "ionice" if value.isdecimal() and int(value) <= 8:
            return found._replace(ionice=int(value))
        case "notes-template":
            return found._replace(notes=value)
        case "protected" if value in ("0", "1"):
            return found._replace(is_protected=value == "1")
        case "prune-backups" if parse_prune(value) is not None:
            return found._replace(prune=value)
        case "remove" if value in ("0", "1"):
            return found._replace(removes=value == "1")
        case "exclude":
            return found._replace(exclude=tuple(filter(None, re.split(r"[,;\s]+", value))))
    return None


def parse_prune(text: str) -> dict[str, int] | None:
    """Return the rules of `keep-last=3,keep-daily=7`, by their names; None: it is not such a list.

    Empty: everything is kept, as `keep-all=1` says.
    """
    rules = {}
    for word in filter(None, re.split(r"[,;\s]+", text)):
        match = _RULE.fullmatch(word)
        if match is None:
            return None
        if match[1] == "all":
            if int(match[2]):
                return {}
        elif int(match[2]):
            rules[match[1]] = int(match[2])
    return rules


def notes_of(template: str, *, vmid: int, name: str, node: str, cluster: str) -> str:
    """Fill vzdump's variables in: {{guestname}}, {{vmid}}, {{node}}, {{cluster}}; \\n is a new line."""
    values = {
        "guestname": name,
        "vmid": str(vmid),
        "node": node,
        "cluster": cluster or "standalone node",
    }
    text = re.sub(r"\\(n|\\)", lambda m: "\n" if m[1] == "n" else "\\", template)
    return re.sub(r"\{\{(\w+)\}\}", lambda m: values.get(m[1], m[0]), text)
