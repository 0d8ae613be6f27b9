# SPDX-License-Identifier: Apache-2.0
"""The file fleet.toml: read as a whole, every mistake in it told at once, with its line and the way out."""

from __future__ import annotations

import difflib
import re
import tomllib
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vmapipe.fleet.inventory import Fleet, FleetHost, FleetTarget, Policy, Rule, SourceStorage
from vmapipe.fleet.windows import parse_interval, parse_window
from vmapipe.runtime.arguments import size
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text, one_line

_MOST_BYTES = 4 << 20
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
# USER@HOST, or ssh://USER@HOST:PORT; a dash at its begin would be an option of ssh's.
_SSH = re.compile(r"(?:ssh://)?[A-Za-z0-9_\[][^\s'\"\\]*")
_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_COMPRESS = re.compile(r"none|zstd(?::(?:[1-9]|1[0-9]))?")
_TIME_MS = re.compile(r"[1-9][0-9]{0,4}(?:ms|s)")
_IONICE = re.compile(r"idle|best-effort:[0-7]")
_KEY = re.compile(r"""\s*(?P<key>[A-Za-z0-9_-]+|"[^"]*"|'[^']*')\s*=""")
_HEAD = re.compile(r"\s*\[(?P<path>[^\[].*?)\]\s*(?:#.*)?$")
_PART = re.compile(r"""\s*([A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')\s*(?:\.|$)""")


class Mistake(NamedTuple):
    """A mistake in a file, `line` counted from 1; 0: not known."""

    line: int
    text: str


class ConfigurationMistakes(UsageError):
    """A file that cannot be used; `lines` are for the user, one a mistake."""

    def __init__(self, path: str, mistakes: list[Mistake]) -> None:
        self.lines = [
            one_line(f"{path}:{m.line}: {m.text}" if m.line else f"{path}: {m.text}")
            for m in sorted(mistakes)
        ]
        count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        super().__init__(f"{count} in {path}: {self.lines[0]}")


class AnsibleSource(NamedTuple):
    """Where hosts of an Ansible inventory come from, and what they all have."""

    inventory: str
    group: str
    host: Mapping[str, Any]


def load(path: str) -> tuple[Fleet, AnsibleSource | None]:
    """Read a fleet's file. Raises UsageError for one that is not there, ConfigurationMistakes."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; --file names another one, and "
            "docs/operations/fleet.md shows a first one"
        ) from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path} has more than {_MOST_BYTES >> 20} MiB: is it the right file?")
    return parse(data, path)


def parse(data: bytes, path: str = "fleet.toml") -> tuple[Fleet, AnsibleSource | None]:
    """Return what a file says. Raises ConfigurationMistakes with all its mistakes."""
    try:
        text = data.decode()
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationMistakes(path, [Mistake(line, "it is not UTF-8")]) from error
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"line (\d+)", str(error))
        mistake = Mistake(int(match[1]) if match else 0, f"it is not valid TOML: {error}")
        raise ConfigurationMistakes(path, [mistake]) from error
    reader = _FileReader(text)
    fleet, ansible = reader.fleet(tables)
    if reader.mistakes:
        raise ConfigurationMistakes(path, reader.mistakes)
    return fleet, ansible


def check_references(fleet: Fleet, path: str) -> None:
    """Raises ConfigurationMistakes for hosts that targets name and nobody has: after Ansible's came."""
    known = ", ".join(fleet.hosts) or "none"
    mistakes = [
        Mistake(0, f"target {t.name}: host {name_text(t.host)} is not a host (hosts: {known})")
        for t in fleet.targets.values()
        if t.host and t.host not in fleet.hosts
    ]
    if not fleet.hosts:
        mistakes.append(Mistake(0, 'no hosts: say [host.NAME] guests = "qmp:/run/vm/*.qmp"'))
    if mistakes:
        raise ConfigurationMistakes(path, mistakes)


# --- Values: each raises ValueError with words for the user ---


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value or "\n" in value:
        raise ValueError("it has to be a text of one line, in quotes")
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
        text = _text(value)
        if not pattern.fullmatch(text):
            raise ValueError(f"{text!r} is not valid here; for example: {example}")
        return text

    return read


def _texts(value: object) -> tuple[str, ...]:
    found = tuple(map(_text, value if isinstance(value, list) else [value]))
    if any(word.startswith("-") or not word for word in found):
        raise ValueError("none of them may be empty or begin with a dash")
    return found


def _windows(value: object) -> Any:
    return tuple(map(parse_window, _texts(value)))


def _interval(value: object) -> float:
    return parse_interval(_text(value))


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
    return tuple((rule, _number(0, 10**6)(value[rule])) for rule in _RULES if rule in value)


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


Values = Mapping[str, tuple[str, Callable[[object], Any]]]

_POLICY: Values = {
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
    "disks": ("disks", _texts),
    "exclude": ("exclude", _texts),
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
_HOST: Values = {
    "ssh": ("ssh", _like(_SSH, "root@pve1, ssh://root@pve1:2222")),
    "jobs": ("jobs", _number(0, 1000)),
    "drills": ("drills", _number(0, 100)),
    "guests": ("guests", _guests),
    "command": ("command", _texts),
    "prefix": ("prefix", _like(_PLAIN, "pve1-")),
}
_TARGET: Values = {
    "archiver": ("archiver", _like(re.compile(r"tcp://[^\s/]+:\d+"), "tcp://b1:7777")),
    "keys": ("keys", _path),
    "directory": ("directory", _path),
    "s3": ("s3", _s3),
    "host": ("host", _text),
    "jobs": ("jobs", _number(0, 1000)),
    "copy_from": ("copy_from", _text),
    "lock": ("lock", _like(re.compile(r"[1-9][0-9]{0,4}d"), "30d")),
    "keep": ("keep", _keep),
}
_ANSIBLE: Values = {
    "inventory": ("inventory", _path),
    "group": ("group", _text),
    **{k: _HOST[k] for k in ("jobs", "drills", "guests", "command")},
}
_SECTIONS = ("defaults", "limits", "fleet", "ansible", "host", "storage", "target", "vm")


class _FileReader:
    def __init__(self, text: str) -> None:
        self.mistakes = list[Mistake]()
        self._lines = _lines_of(text)

    def fleet(self, tables: Mapping[str, Any]) -> tuple[Fleet, AnsibleSource | None]:
        for name in set(tables) - set(_SECTIONS):
            self._say(
                (name,), f"[{name}] is not a part of this file{_like_one_of(name, _SECTIONS)}"
            )
        defaults = Policy(**self._values(("defaults",), tables.get("defaults", {}), _POLICY))
        limits = self._values(
            ("limits",), tables.get("limits", {}), {"total": ("total", _number(0, 100_000))}
        )
        general = self._values(
            ("fleet",),
            tables.get("fleet", {}),
            {"database": ("database", _text), "catalogue": ("catalogue", _path)},
        )
        hosts = {
            name: FleetHost(name, **self._values(("host", name), table, _HOST))
            for name, table in self._named(tables, "host")
        }
        storages = {
            name: SourceStorage(
                name,
                self._values(("storage", name), table, {"jobs": ("jobs", _number(0, 1000))}).get(
                    "jobs", 4
                ),
            )
            for name, table in self._named(tables, "storage", plain=False)
        }
        targets = {
            name: FleetTarget(name, **self._values(("target", name), table, _TARGET))
            for name, table in self._named(tables, "target")
        }
        rules = [
            Rule(name, tuple(self._values(("vm", name), table, _POLICY).items()))
            for name, table in self._named(tables, "vm", plain=False)
        ]
        fleet = Fleet(hosts, targets, storages, rules, defaults, **limits, **general)
        if not self.mistakes:  # what they left out would be told a second time
            self._check(fleet)
        return fleet, self._ansible(tables)

    def _ansible(self, tables: Mapping[str, Any]) -> AnsibleSource | None:
        if "ansible" not in tables:
            return None
        values = self._values(("ansible",), tables["ansible"], _ANSIBLE)
        if "inventory" not in values:
            self._say(("ansible",), '[ansible] needs inventory = "/etc/ansible/hosts"')
        return AnsibleSource(values.pop("inventory", ""), values.pop("group", "all"), values)

    def _named(
        self, tables: Mapping[str, Any], section: str, *, plain: bool = True
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        found = tables.get(section, {})
        if not isinstance(found, dict):
            self._say((section,), f"{section} has to be tables: [{section}.NAME]")
            return
        for name, table in found.items():
            if not isinstance(table, dict):
                self._say(
                    (section, name), f"{section}.{name} has to be a table: [{section}.{name}]"
                )
            elif plain and not _PLAIN.fullmatch(name):
                self._say(
                    (section, name),
                    f"{name_text(name)} is not a name for a {section}: letters, digits, _ . - and at "
                    "most 64 of them",
                )
            else:
                yield name, table

    def _values(self, path: tuple[str, ...], table: object, known: Values) -> dict[str, Any]:
        found = dict[str, Any]()
        if not isinstance(table, dict):
            self._say(path, f"{'.'.join(path)} has to be a table: [{'.'.join(path)}]")
            return found
        for key, value in table.items():
            if key not in known:
                what = f"{key} is not an option of [{'.'.join(path)}]"
                self._say((*path, key), what + _like_one_of(key, known))
                continue
            field, read = known[key]
            try:
                found[field] = read(value)
            except ValueError as error:
                self._say((*path, key), f"{key}: {error}")
        return found

    def _check(self, fleet: Fleet) -> None:
        """What one value says of another."""
        places: list[tuple[tuple[str, ...], str]] = [
            (("defaults", "target"), fleet.defaults.target)
        ]
        places += [
            (("vm", rule.pattern, "target"), value)
            for rule in fleet.rules
            for key, value in rule.changes
            if key == "target"
        ]
        places += [(("target", t.name, "copy_from"), t.copy_from) for t in fleet.targets.values()]
        for path, name in places:
            if name and name not in fleet.targets:
                known = ", ".join(fleet.targets) or "none"
                self._say(path, f"{name_text(name)} is not a target (targets: {known})")
        for target in fleet.targets.values():
            at = ("target", target.name)
            if not (target.archiver or target.directory or target.s3):
                self._say(at, f"target {target.name} needs archiver, directory or s3")
            if target.archiver and not target.keys:
                self._say(
                    at, f"target {target.name}: archiver needs keys (vmapipe keygen makes them)"
                )
            if target.copy_from == target.name:
                self._say((*at, "copy_from"), "a target cannot be a copy of itself")

    def _say(self, path: tuple[str, ...], text: str) -> None:
        line = 0
        for length in range(len(path), 0, -1):
            if line := self._lines.get(path[:length], 0):
                break
        self.mistakes.append(Mistake(line, text))


def _like_one_of(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f": is {close[0]} meant?" if close else f" (there are {', '.join(known)})"


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """Return on which line each table and each key begins, as far as a look at single lines tells."""
    found = dict[tuple[str, ...], int]()
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if head := _HEAD.match(line):
            table = tuple(_bare(part) for part in _PART.findall(head["path"]))
            for length in range(1, len(table) + 1):
                found.setdefault(table[:length], number)
            found[table] = number
        elif key := _KEY.match(line):
            found.setdefault((*table, _bare(key["key"])), number)
    return found


def _bare(word: str) -> str:
    if word[:1] == '"':
        try:
            return str(tomllib.loads(f"a = {word}")["a"])
        except tomllib.TOMLDecodeError:
            return word
    return word.strip("'")
