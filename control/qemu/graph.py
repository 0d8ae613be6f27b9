# SPDX-License-Identifier: Apache-2.0
"""QEMU's block nodes and what stands above them, from its own answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vmapipe.control.qmp.connection import Answer

#: Drivers that QEMU puts above a disk while one of its block jobs works on it.
JOB_FILTERS = frozenset({"backup-top", "commit_top", "copy-before-write", "mirror_top"})
# Filters that only the guest should pay for, and below which its disk reads the same: the guest's
# I/O limit, and what fills an image from its backing file with whatever is read. All others stay
# in the way: blkdebug and its kin are there to change what a reader sees, and an
# unknown filter may change anything.
_GUESTS_FILTERS = frozenset({"throttle", "copy-on-read"})
_DRIVER, _JOB = "block-driver", "block-job"
# QEMU's chains of overlays are shorter; an answer may have a circle.
_MOST_BELOW = 1000


class NodeUser(NamedTuple):
    """The user of a node, in a role: `file`, `backing`, `root`, `source`, `target` …"""

    kind: str
    name: str
    role: str


class Graph:
    """The graph in the answers to query-named-block-nodes (flat) and x-debug-query-block-graph.

    The second may be missing (a QEMU that refuses unstable commands). QEMU 11 then tells the
    children of each node in the first; with an older one each node stands for itself.
    """

    def __init__(self, nodes: Sequence[Answer] = (), answer: Answer | None = None) -> None:
        self._nodes = {str(node.get("node-name", "")): node for node in nodes}
        self._parents: dict[str, list[NodeUser]] = {}
        self._children: dict[str, dict[str, str]] = {}
        found = answer or {}
        for name, node in () if found else self._nodes.items():
            for child in node.get("children") or ():
                self._add(NodeUser(_DRIVER, name, str(child.get("child", ""))), child["node-name"])
        known = {entry.get("id"): entry for entry in found.get("nodes", ())}
        for edge in found.get("edges", ()):
            parent, child = known.get(edge.get("parent"), {}), known.get(edge.get("child"), {})
            if child.get("type") != _DRIVER:
                continue
            kind, name = str(parent.get("type", "")), str(parent.get("name", ""))
            self._add(NodeUser(kind, name, str(edge.get("name", ""))), str(child.get("name", "")))

    def _add(self, parent: NodeUser, below: str) -> None:
        self._parents.setdefault(below, []).append(parent)
        if parent.kind == _DRIVER:
            self._children.setdefault(parent.name, {})[parent.role] = below

    @property
    def nodes(self) -> Iterable[Answer]:
        """All nodes, as QEMU lists them."""
        return self._nodes.values()

    def driver(self, node: str) -> str:
        return str(self._nodes.get(node, {}).get("drv", ""))

    def size_bytes(self, node: str) -> int:
        return int((self._nodes.get(node, {}).get("image") or {}).get("virtual-size", 0))

    def node(self, name: str) -> Answer | None:
        return self._nodes.get(name)

    def below(self, node: str) -> str:
        """The node that this one, a filter or a format, is put on; empty: none is known."""
        return self._children.get(node, {}).get("file", "")

    def overlays(self, node: str) -> Iterator[str]:
        """The nodes whose backing file this one is."""
        return (parent.name for parent in self._parents.get(node, ()) if parent.role == "backing")

    def has_backing(self, node: str) -> bool:
        return "backing" in self._children.get(node, {})

    def users(self, node: str) -> Sequence[NodeUser]:
        """All that stands on this node, or works with it."""
        return self._parents.get(node, ())

    def in_use(self) -> frozenset[str]:
        """The nodes that a device, an export or another node stands on."""
        return frozenset(
            node
            for node, parents in self._parents.items()
            if any(parent.kind != _JOB for parent in parents)
        )

    def tree(self, node: str) -> list[str]:
        """The node and all below it, each before those that it needs."""
        # A node that two others need comes behind both: its last place counts.
        found, waiting = [node], [node]
        while waiting and len(found) < _MOST_BELOW:
            below = self._children.get(waiting.pop(0), {}).values()
            found += below
            waiting += below
        return list(reversed(dict.fromkeys(reversed(found))))

    def jobs(self, node: str) -> Iterator[NodeUser]:
        """The block jobs that work with this node."""
        return (parent for parent in self._parents.get(node, ()) if parent.kind == _JOB)

    def below_filters(self, node: str) -> tuple[str, ...]:
        """Return `node` and the nodes below that show the same bytes, to the one below the guest's
        last filter.

        Only `node` when there is no such filter: then it is the one to read.
        """
        chain, end = [node], 1
        while True:
            top = chain[-1]
            below = self._children.get(top, {}).get("file", "")
            is_filter = self.driver(top) in _GUESTS_FILTERS
            if not below or below in chain or not (is_filter or self._is_plain_raw(top, below)):
                return tuple(chain[:end])
            chain.append(below)
            if is_filter:
                end = len(chain)

    def owner(self, node: str) -> NodeUser | None:
        """The node of which this one is only a part; None: it is a disk's by itself.

        What is below a guest's filter is not a part of it, but the same disk.
        """
        # QEMU's graph has no circles; an answer may have some.
        same, seen = [node], {node}
        while same:
            for parent in self._parents.get(same.pop(), ()):
                if parent.kind != _DRIVER:
                    continue
                if self.driver(parent.name) not in _GUESTS_FILTERS or parent.role != "file":
                    return parent
                if parent.name not in seen:
                    seen.add(parent.name)
                    same.append(parent.name)
        return None

    def top(self, node: str) -> str:
        """The node through which a guest, or an export, reaches this one."""
        seen = {node}
        while True:
            above = [p.name for p in self._parents.get(node, ()) if p.kind == _DRIVER]
            if not above or above[0] in seen:
                return node
            node = above[0]
            seen.add(node)

    def _is_plain_raw(self, node: str, below: str) -> bool:
        """Tell whether a raw node adds nothing: of equal sizes there is no offset in between."""
        size = self.size_bytes(node)
        return self.driver(node) == "raw" and size > 0 and size == self.size_bytes(below)
