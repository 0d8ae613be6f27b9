# SPDX-License-Identifier: Apache-2.0
"""The guests of a Proxmox VE node, and the choice of those that a command line asks for. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple
from urllib.parse import unquote

from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import file_lines, name_text

Kind = Literal["qemu", "lxc"]

ALL = "all"
_VMID = re.compile(r"[1-9][0-9]{2,8}")
_SEPARATORS = re.compile(r"[,;\s]+")
# Pools may lie in pools: `prod/web` (PVE::API2::Pool).
_POOL = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+){0,2}")


class PveGuest(NamedTuple):
    """A machine or a container as its configuration describes it; `node`: where it is."""

    vmid: int
    kind: Kind
    node: str
    is_template: bool = False
    tags: frozenset[str] = frozenset()


class Inventory(NamedTuple):
    """All that a choice can be made of: this `node`, the cluster's guests, its pools."""

    node: str
    guests: Mapping[int, PveGuest]
    pools: Mapping[str, frozenset[int]]


class LeftOutGuest(NamedTuple):
    """A guest that is not backed up, and why; `failed`: it was asked for by its number."""

    vmid: int
    reason: str
    failed: bool = False


class Selection(NamedTuple):
    """Machines in the order of their numbers, those that are left out, and remarks for the user."""

    vmids: tuple[int, ...]
    left_out: tuple[LeftOutGuest, ...]
    remarks: tuple[str, ...] = ()


def parse_pools(text: str) -> dict[str, frozenset[int]]:
    """Return the pools of /etc/pve/user.cfg: `pool:NAME:COMMENT:VMIDS:STORAGES:`."""
    pools = {}
    for line in file_lines(text):
        kind, _, rest = line.partition(":")
        fields = rest.split(":")
        if kind == "pool" and len(fields) >= 3 and _POOL.fullmatch(unquote(fields[0])):
            members = (word for word in _SEPARATORS.split(fields[2]) if _VMID.fullmatch(word))
            pools[unquote(fields[0])] = frozenset(map(int, members))
    return pools


def parse_tags(value: str) -> frozenset[str]:
    """Return the tags of a configuration's line `tags: a;b`."""
    return frozenset(word.lower() for word in _SEPARATORS.split(value) if word)


def select(words: Sequence[str], excluded: Sequence[str], inventory: Inventory) -> Selection:
    """Choose machines: numbers, `all`, pools, tags, each less what `excluded` says in the same words.

    Only machines of this node can be backed up; the others are said to be left out. Raises UsageError
    for a name that is neither a pool's nor a tag's.
    """
    by_number, by_group = set[int](), set[int]()
    remarks = list[str]()
    for word in _split(words):
        if _VMID.fullmatch(word):
            by_number.add(int(word))
        else:
            members = _members(word, inventory, remarks)
            by_group |= members
            if not members:
                remarks.append(f"--pve {word}: there is no machine in it")
    out = set[int]()
    for word in _split(excluded):
        if _VMID.fullmatch(word):
            out.add(int(word))
            if int(word) not in inventory.guests:
                remarks.append(f"--exclude {word}: no guest has this number")
        else:
            out |= _members(word, inventory, [])
    chosen, left = [], []
    for vmid in sorted(by_number | by_group):
        reason = "" if vmid not in out else "it is excluded"
        is_named = vmid in by_number and not reason
        reason = reason or _unfit(vmid, inventory, is_named=is_named)
        if reason:
            left.append(LeftOutGuest(vmid, reason, is_named))
        else:
            chosen.append(vmid)
    return Selection(tuple(chosen), tuple(left), tuple(remarks))


def _split(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a list that may have commas. Raises UsageError for an empty one."""
    for word in words:
        for part in word.split(","):
            if not part.strip():
                raise UsageError(f"--pve {word!r}: name machines, pools or tags, or say all")
            yield part.strip()


def _members(word: str, inventory: Inventory, remarks: list[str]) -> set[int]:
    """Return the guests of a pool, of a tag, or of this node. Raises UsageError."""
    if word == ALL:
        return {vmid for vmid, guest in inventory.guests.items() if guest.node == inventory.node}
    kind, colon, name = word.partition(":")
    if not colon or kind not in ("pool", "tag"):
        kind, name = "", word
    pool = inventory.pools.get(name)
    tagged = {v for v, guest in inventory.guests.items() if name.lower() in guest.tags}
    if not kind and pool is not None and tagged:
        raise UsageError(f"{word!r} is a pool and a tag: say pool:{name} or tag:{name}")
    if kind != "tag" and pool is not None:
        below = sorted(other for other in inventory.pools if other.startswith(f"{name}/"))
        if below:
            remarks.append(
                f"pool {name}: the pools below it ({', '.join(below)}) are not included: name them, too"
            )
        return set(pool)
    if kind != "pool" and tagged:
        return tagged
    pools = ", ".join(sorted(inventory.pools)) or "none"
    tags = ", ".join(sorted({tag for guest in inventory.guests.values() for tag in guest.tags}))
    what = {"pool": "a pool", "tag": "a tag"}.get(kind, "a machine's number, a pool or a tag")
    raise UsageError(
        f"{name_text(name)} is not {what} (pools: {pools}; tags: {tags or 'none'}); all: every machine "
        "of this node"
    )


def _unfit(vmid: int, inventory: Inventory, *, is_named: bool) -> str:
    """Return why a guest cannot be backed up here; empty: it can."""
    guest = inventory.guests.get(vmid)
    if guest is None:
        return "no machine of this node or its cluster has this number"
    if guest.kind == "lxc":
        return "it is a container, which vmapipe does not back up: use vzdump"
    if guest.node != inventory.node:
        return f"it is on node {guest.node}: run the backup there"
    if guest.is_template and not is_named:
        return "it is a template, which does not change: name it by its number to back it up"
    return ""
