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
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text, one_line

_MOST_BYTES = 16 << 20
_ANSIBLE_S = 60.0
_RANGE = re.compile(r"\[([0-9]+|[a-z]|[A-Z]):([0-9]+|[a-z]|[A-Z])(?::([0-9]+))?\]")
_MOST_HOSTS = 10_000
_SECTION = re.compile(r"\[([^\]:]+)(?::(\w+))?\]")
_WITH_PORT = re.compile(r"([^:\[\]]+|.*\]):([0-9]{1,5})")
_WORDS = re.compile(r"[A-Za-z0-9_\[:.][^\s'\"\\]*")
_LOCAL = "local"
# As fleet.toml's: a host's name is a part of folders' names, too.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_DEPTH = 50


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
    if len(names) > _MOST_HOSTS:
        raise UsageError(f"{path}: it has more than {_MOST_HOSTS} hosts")
    groups = defaultdict[str, list[str]](list)
    for one in found.variables:
        if one != "all" and found.variables[one]:
            for name in _below(found, one):
                groups[name].append(one)
    return [_host(path, name, _variables(found, name, groups[name])) for name in names]


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
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: it is not valid JSON: {one_line(str(error), 500)}") from error
    found = _Variables({}, {}, {}, {})
    if not isinstance(data, dict):
        raise UsageError(f"{path}: it is not an inventory")
    for group, value in data.items():
        if group == "_meta":
            for name, values in _dict(_dict(value).get("hostvars")).items():
                found.hosts.setdefault(str(name), {}).update(_dict(values))
            continue
        about = {"hosts": value} if isinstance(value, list) else _dict(value)
        for key, kept in (("hosts", found.members), ("children", found.children)):
            listed = about.get(key) or []
            if not isinstance(listed, list | dict):
                raise UsageError(f"{path}: {key} of group {name_text(group)} are not a list")
            kept.setdefault(group, []).extend(map(str, listed))
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: it is not valid YAML: {one_line(str(error), 500)}; what "
            "Ansible alone reads (!vault) is in the output of `ansible-inventory --list`"
        ) from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: it is not an inventory")
    found = _Variables({}, {}, {}, {})
    for group, about in data.items():
        _add_group(found, path, str(group), about, 0)
    return found


def _add_group(found: _Variables, path: str, group: str, about: object, depth: int) -> None:
    # An alias may stand for a group in itself, or again and again in each other.
    if depth > _DEPTH or sum(map(len, found.members.values())) > 10 * _MOST_HOSTS:
        raise UsageError(f"{path}: group {name_text(group)}: groups within groups within groups")
    table = _dict(about)
    hosts = table.get("hosts")
    if hosts is not None and not isinstance(hosts, dict):
        raise UsageError(
            f"{path}: hosts of group {name_text(group)} have to be names with a colon each, as Ansible "
            "wants it, not a list"
        )
    for name, values in _dict(hosts).items():
        for one in _expanded(path, str(name)):
            found.hosts.setdefault(one, {}).update(_dict(values))
            found.members.setdefault(group, []).append(one)
    found.variables.setdefault(group, {}).update(_dict(table.get("vars")))
    found.members.setdefault(group, [])
    for child, below in _dict(table.get("children")).items():
        found.children.setdefault(group, []).append(str(child))
        _add_group(found, path, str(child), below, depth + 1)


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
            raise UsageError(f"{path}:{number}: {name_text(line[:200])} is not a section's head")
        if kind == "vars":
            name, _, value = line.partition("=")
            found.variables.setdefault(group, {})[name.strip()] = value.strip().strip("'\"")
        elif kind not in ("", "children"):
            raise UsageError(f"{path}:{number}: [{group}:{kind}] is not hosts, vars or children")
        elif kind == "children":
            found.children.setdefault(group, []).append(words[0])
        else:
            values = dict(word.partition("=")[::2] for word in words[1:])
            pattern = words[0]
            if (port := _WITH_PORT.fullmatch(pattern)) and not _RANGE.search(port[0][-8:]):
                pattern, values = port[1], {"ansible_port": port[2], **values}
            for name in _expanded(f"{path}:{number}", pattern):
                found.hosts.setdefault(name, {}).update(values)
                found.members.setdefault(group, []).append(name)
    return found


def _expanded(where: str, pattern: str) -> list[str]:
    """`web[01:03]` to three names. Raises UsageError for more than an inventory may have."""
    names = list[str]()
    for name in _names(where, pattern):
        names.append(name)
        if len(names) > _MOST_HOSTS:
            raise UsageError(f"{where}: {name_text(pattern)}: more than {_MOST_HOSTS} hosts")
    if not names:
        raise UsageError(f"{where}: {name_text(pattern)}: its range has nothing in it")
    return names


def _names(where: str, name: str) -> Iterator[str]:
    match = _RANGE.search(name)
    if match is None:
        yield name
        return
    first, last, step = match[1], match[2], max(1, int((match[3] or "1")[:9]))
    if first.isdecimal() and last.isdecimal() and len(last) < 10:
        values = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1, step))
    elif first.isdecimal() or last.isdecimal():
        raise UsageError(f"{where}: {name_text(name)}: {match[0]} is not a range")
    else:
        values = (chr(n) for n in range(ord(first), ord(last) + 1, step))
    before, after = name[: match.start()], name[match.end() :]
    for value in values:
        yield from _names(where, before + value + after)


def _below(found: _Variables, group: str) -> list[str]:
    names, seen, todo = dict[str, None](), set[str](), [group]
    while todo:
        one = todo.pop(0)
        if one not in seen:
            seen.add(one)
            names |= dict.fromkeys(found.members.get(one, []))
            todo += found.children.get(one, [])
    return list(names)


def _variables(found: _Variables, name: str, groups: list[str]) -> Mapping[str, Any]:
    values = dict(found.variables.get("all", {}))
    for group in groups:
        values |= found.variables[group]
    return values | found.hosts.get(name, {})


def _host(path: str, name: str, values: Mapping[str, Any]) -> AnsibleHost:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{path}: {name_text(name)} is not a name for a host: letters, digits, _ . - and at most 64 of "
            "them; ansible_host says the address"
        )
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
    if port and ":" in address:
        address = f"[{address}]"  # or the port would be a part of it
    who = f"{user}@{address}" if user else address
    return AnsibleHost(name, f"ssh://{who}:{port}" if port and port != "22" else who)
