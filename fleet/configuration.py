# SPDX-License-Identifier: Apache-2.0
"""The file fleet.toml: read as a whole, every mistake in it told at once, with its line and the way out."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vmapipe.fleet.inventory import (
    RULE_KINDS,
    Fleet,
    FleetHost,
    FleetTarget,
    Policy,
    Rule,
    SourceStorage,
)
from vmapipe.fleet.values import (
    ANSIBLE,
    GENERAL,
    HOST,
    LIMITS,
    PLAIN_NAME,
    POLICY,
    STORAGE,
    TARGET,
    Values,
)
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text, one_line

_MOST_BYTES = 4 << 20
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
        # The line names the file, and where in it.
        super().__init__(f"{count}: {self.lines[0]}")


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
        # Windows' editors begin a file with a mark.
        text = data.decode("utf-8-sig")
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationMistakes(path, [Mistake(line, "it is not UTF-8")]) from error
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"line (\d+)", str(error))
        words = f"it is not valid TOML: {error}{_way_out(str(error))}"
        mistake = Mistake(int(match[1]) if match else 0, words)
        raise ConfigurationMistakes(path, [mistake]) from error
    except RecursionError as error:
        raise ConfigurationMistakes(path, [Mistake(0, "lists in lists in lists")]) from error
    reader = _FileReader(text)
    fleet, ansible = reader.fleet(tables)
    if reader.mistakes:
        raise ConfigurationMistakes(path, reader.mistakes)
    return fleet, ansible


def _way_out(error: str) -> str:
    """What to do about an error of TOML's that many make."""
    return next((f"; {words}" for part, words in _TOML_HINTS.items() if part in error), "")


def check_references(fleet: Fleet, path: str) -> None:
    """Raises ConfigurationMistakes for hosts that targets name and nobody has, and those without a use.

    Call it when the hosts of other inventories are there.
    """
    known = ", ".join(fleet.hosts) or "none"
    lines = dict[tuple[str, ...], int]()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        lines = _lines_of(file.read(_MOST_BYTES).decode("utf-8-sig", "replace"))
    mistakes = [
        Mistake(
            lines.get(("target", t.name, "host"), 0),
            f"target {t.name}: host {name_text(t.host)} is not a host (hosts: {known})",
        )
        for t in fleet.targets.values()
        if t.host and t.host not in fleet.hosts
    ]
    used = {target.host for target in fleet.targets.values()}
    mistakes += [
        Mistake(
            line, f"host {name} has no machines and no archives: guests = … says how to find some"
        )
        for name, host in fleet.hosts.items()
        # What an inventory has besides is not a mistake of this file.
        if not host.guests and name not in used and (line := lines.get(("host", name), 0))
    ]
    if not fleet.hosts:
        mistakes.append(Mistake(0, 'no hosts: say [host.NAME] guests = "qmp:/run/vm/*.qmp"'))
    if mistakes:
        raise ConfigurationMistakes(path, mistakes)


_SECTIONS = ("defaults", "limits", "fleet", "ansible", "host", "storage", "target", "vm")


# What an error of TOML's means most of the time.
_TOML_HINTS: Mapping[str, str] = {
    "Cannot overwrite": "it is there twice, or as something else before",
    "twice": "the two have to be one",
    "end of a table declaration": 'a name with other characters stands in quotes: [vm."web*"]',
    "Invalid value": 'a text stands in quotes: "…"',
    "Illegal character": "a quote is missing",
    "Expected '=' after a key": "a key with other characters stands in quotes",
}


class _FileReader:
    def __init__(self, text: str) -> None:
        self.mistakes = list[Mistake]()
        self._lines = _lines_of(text)

    def fleet(self, tables: Mapping[str, Any]) -> tuple[Fleet, AnsibleSource | None]:
        for name in set(tables) - set(_SECTIONS):
            self._say(
                (name,), f"[{name}] is not a part of this file{_like_one_of(name, _SECTIONS)}"
            )
        defaults = Policy(**self._values(("defaults",), tables.get("defaults", {}), POLICY))
        limits = self._values(("limits",), tables.get("limits", {}), LIMITS)
        general = self._values(
            ("fleet",),
            tables.get("fleet", {}),
            GENERAL,
        )
        hosts = {
            name: FleetHost(name, **self._values(("host", name), table, HOST))
            for name, table in self._named(tables, "host")
        }
        storages = {
            name: SourceStorage(
                name,
                self._values(("storage", name), table, STORAGE).get("jobs", 4),
            )
            for name, table in self._named(tables, "storage", plain=False)
        }
        targets = {
            name: FleetTarget(name, **self._values(("target", name), table, TARGET))
            for name, table in self._named(tables, "target")
        }
        for name, _ in self._named(tables, "vm", plain=False):
            self._check_pattern(name)
        rules = [
            Rule(name, tuple(self._values(("vm", name), table, POLICY).items()))
            for name, table in self._named(tables, "vm", plain=False)
        ]
        fleet = Fleet(hosts, targets, storages, rules, defaults, **limits, **general)
        if not self.mistakes:  # what they left out would be told a second time
            self._check(fleet)
        return fleet, self._ansible(tables)

    def _ansible(self, tables: Mapping[str, Any]) -> AnsibleSource | None:
        if "ansible" not in tables:
            return None
        values = self._values(("ansible",), tables["ansible"], ANSIBLE)
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
            elif plain and not PLAIN_NAME.fullmatch(name):
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

    def _check_pattern(self, pattern: str) -> None:
        kind, colon, rest = pattern.partition(":")
        if not pattern or (colon and kind in RULE_KINDS and not rest):
            self._say(("vm", pattern), f"[vm.{json.dumps(pattern)}] fits no machine")
        elif (
            colon
            and kind not in RULE_KINDS
            and (close := difflib.get_close_matches(kind, RULE_KINDS, 1))
        ):
            self._say(("vm", pattern), f"{kind}: is {close[0]}: meant?")

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
            source = fleet.targets.get(target.copy_from)
            if source is not None and source.copy_from:
                # Copies are made of what backups have stored.
                self._say(
                    (*at, "copy_from"), f"{source.name} takes copies itself: name what it copies"
                )

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
