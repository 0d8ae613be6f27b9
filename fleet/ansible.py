# SPDX-License-Identifier: Apache-2.0
"""Hosts out of an Ansible inventory: INI, YAML, or the JSON of `ansible-inventory --list`.

Only what a connection needs is read: names, groups, ansible_host, ansible_user, ansible_port. Whatever
Ansible itself would have to compute (plugins, vault, templates) goes through `ansible-inventory`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text, one_line

_MOST_BYTES = 16 << 20
_ANSIBLE_S = 60.0
_RANGE = re.compile(r"\[([0-9]+|[a-z]|[A-Z]):([0-9]+|[a-z]|[A-Z])(?::([0-9]+))?\]")
_MOST_HOSTS = 10_000
_SECTION = re.compile(r"\[([^\]:]+)(?::(children|vars))?\]")
_WORDS = re.compile(r"[A-Za-z0-9_\[:.][^\s'\"\\]*")
_LOCAL = "local"


class AnsibleHost(NamedTuple):
    """A host of an inventory. `ssh`: its address for ssh; empty: it is this host."""

    name: str
    ssh: str


class _Variables(NamedTuple):
    """Variables by host; variables, hosts and groups by group."""

    hosts: dict[str, dict[str, Any]]
    variables: dict[str, dict[str, Any]]
    members: dict[str, list[str]]
    children: dict[str, list[str]]


def read_hosts(path: str, group: str = "all") -> list[AnsibleHost]:
    """Return the hosts of a group. Raises UsageError."""
    found = _read(path)
    if group == "all":
        names = list(found.hosts)
    elif group in found.members or group in found.children:
        names = _below(found, group)
    else:
        known = ", ".join(sorted({*found.members, *found.children})) or "none"
        raise UsageError(f"{path}: no group {name_text(group)} in it (groups: {known})")
    return [_host(path, name, _variables(found, name)) for name in names]


def _read(path: str) -> _Variables:
    try:
        # A folder or a program is what Ansible alone understands.
        if os.path.isdir(path) or os.access(path, os.X_OK):
            return _from_json(path, _ask_ansible(path))
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES).decode()
    except OSError as error:
        raise UsageError(f"cannot read the inventory {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: it is not UTF-8") from error
    if text.lstrip().startswith("{"):
        return _from_json(path, text)
    if path.endswith((".yml", ".yaml")) or re.match(r"\s*(?:---|all:)", text):
        return _from_yaml(path, text)
    return _from_ini(path, text)


def _ask_ansible(path: str) -> str:
    program = shutil.which("ansible-inventory")
    if program is None:
        raise UsageError(
            f"{path}: `ansible-inventory` is needed to read it (apt install ansible-core); or save the "
            "output of `ansible-inventory --list` where you have it, and name that file"
        )
    try:
        done = subprocess.run(
            [program, "-i", path, "--list"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_ANSIBLE_S,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"{path}: ansible-inventory took more than {_ANSIBLE_S:.0f} s") from None
    if done.returncode:
        raise UsageError(f"{path}: ansible-inventory: {one_line(done.stderr.strip(), 500)}")
    return done.stdout


def _from_json(path: str, text: str) -> _Variables:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path}: it is not valid JSON: {error}") from error
    found = _Variables({}, {}, {}, {})
    if not isinstance(data, dict):
        raise UsageError(f"{path}: it is not an inventory")
    for group, value in data.items():
        if group == "_meta":
            for name, values in _dict(_dict(value).get("hostvars")).items():
                found.hosts.setdefault(str(name), {}).update(_dict(values))
            continue
        about = {"hosts": value} if isinstance(value, list) else _dict(value)
        found.members.setdefault(group, []).extend(map(str, about.get("hosts") or []))
        found.children.setdefault(group, []).extend(map(str, about.get("children") or []))
        found.variables.setdefault(group, {}).update(_dict(about.get("vars")))
    for names in found.members.values():
        for name in names:
            found.hosts.setdefault(name, {})
    return found


def _from_yaml(path: str, text: str) -> _Variables:
    try:
        import yaml
    except ImportError:
        return _from_json(path, _ask_ansible(path))
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: it is not valid YAML: {one_line(str(error), 500)}") from error
    found = _Variables({}, {}, {}, {})
    for group, about in _dict(data).items():
        _add_group(found, str(group), about, 0)
    return found


def _add_group(found: _Variables, group: str, about: object, depth: int) -> None:
    if depth > 50:
        raise UsageError(f"group {name_text(group)}: groups within groups within groups")
    table = _dict(about)
    for name, values in _dict(table.get("hosts")).items():
        for one in _expanded(str(name)):
            found.hosts.setdefault(one, {}).update(_dict(values))
            found.members.setdefault(group, []).append(one)
    found.variables.setdefault(group, {}).update(_dict(table.get("vars")))
    found.members.setdefault(group, [])
    for child, below in _dict(table.get("children")).items():
        found.children.setdefault(group, []).append(str(child))
        _add_group(found, str(child), below, depth + 1)


def _dict(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _from_ini(path: str, text: str) -> _Variables:
    found = _Variables({}, {}, {}, {})
    group, kind = "ungrouped", ""
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line[0] in "#;":
            continue
        if section := _SECTION.fullmatch(line.split(" #")[0].strip()):
            group, kind = section[1], section[2] or ""
            found.members.setdefault(group, [])
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        if line[0] == "[" or not words:
            raise UsageError(f"{path}:{number}: {name_text(line)} is not a section's head")
        if kind == "vars":
            name, _, value = line.partition("=")
            found.variables.setdefault(group, {})[name.strip()] = value.strip().strip("'\"")
        elif kind == "children":
            found.children.setdefault(group, []).append(words[0])
        else:
            values = dict(word.partition("=")[::2] for word in words[1:])
            for name in _expanded(words[0]):
                found.hosts.setdefault(name, {}).update(values)
                found.members[group] = [*found.members.get(group, []), name]
    return found


def _expanded(name: str) -> list[str]:
    """`web[01:03]` to three names."""
    match = _RANGE.search(name)
    if match is None:
        return [name]
    first, last, step = match[1], match[2], int(match[3] or 1)
    if first.isdecimal() and last.isdecimal():
        numbers = range(int(first), int(last) + 1, max(1, step))
        if len(numbers) > _MOST_HOSTS:
            raise UsageError(f"{name_text(name)}: more than {_MOST_HOSTS} hosts")
        values = [str(n).zfill(len(first)) for n in numbers]
    else:
        values = [chr(n) for n in range(ord(first[0]), ord(last[0]) + 1, max(1, step))]
    before, after = name[: match.start()], name[match.end() :]
    return [one for value in values for one in _expanded(before + value + after)]


def _below(found: _Variables, group: str) -> list[str]:
    names, seen, todo = dict[str, None](), set[str](), [group]
    while todo:
        one = todo.pop(0)
        if one not in seen:
            seen.add(one)
            names |= dict.fromkeys(found.members.get(one, []))
            todo += found.children.get(one, [])
    return list(names)


def _variables(found: _Variables, name: str) -> Mapping[str, Any]:
    values = dict(found.variables.get("all", {}))
    for group in found.variables:
        if group != "all" and name in _below(found, group):
            values |= found.variables[group]
    return values | found.hosts.get(name, {})


def _host(path: str, name: str, values: Mapping[str, Any]) -> AnsibleHost:
    if values.get("ansible_connection") == _LOCAL:
        return AnsibleHost(name, "")
    address = str(values.get("ansible_host") or name)
    user = str(values.get("ansible_user") or "")
    port = str(values.get("ansible_port") or "")
    for word in filter(None, (address, user, port)):
        if not _WORDS.fullmatch(word) or "{{" in word or (word == port and not port.isdecimal()):
            raise UsageError(
                f"{path}: host {name_text(name)}: {name_text(word)} is not an address, a user or a port "
                "that can be used as it is; save the output of `ansible-inventory --list`, and name that"
            )
    who = f"{user}@{address}" if user else address
    return AnsibleHost(name, f"ssh://{who}:{port}" if port and port != "22" else who)
