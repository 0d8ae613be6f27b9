# SPDX-License-Identifier: Apache-2.0
"""Paths: links on the way, letters large and small, and what has no end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.access.files.lookup import find_file

# Folders by name, files as text, links as bytes.
Node = Mapping[bytes, "Node"] | str | bytes
TREE: Node = {
    b"bin": b"usr/bin",
    b"usr": {b"bin": {b"bash": "bash", b"up": b"../../etc"}, b"lib": {}},
    b"etc": {b"fstab": "fstab", b"abs": b"/usr/./lib/..//bin", b"out": b"../../../../etc"},
    b"round": b"about",
    b"about": b"round",
    b"Twin": "large",
    b"twin": "small",
    b"Windows": {b"System32": "dll", "É".encode(): "accent"},
}


def children(node: Node) -> Iterator[tuple[bytes, Node]]:
    return iter(node.items() if isinstance(node, Mapping) else ())


def target(node: Node) -> bytes | None:
    return node if isinstance(node, bytes) else None


def find(path: bytes, folds_case: bool = False) -> Node | None:
    return find_file(TREE, path, children, target, folds_case=folds_case)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (b"/", TREE),
        (b"/etc//fstab/", "fstab"),
        (b"/bin", b"usr/bin"),
        (b"/bin/bash", "bash"),
        (b"/bin/up/fstab", "fstab"),
        (b"/etc/abs/bash", "bash"),
        (b"/etc/out/fstab", "fstab"),
        (b"/round", b"about"),
        (b"/round/x", None),
        (b"/etc/../etc", None),
        (b"/etc/./fstab", None),
        (b"/etc/fstab/x", None),
        (b"/nope/x", None),
        (b"/twin", "small"),
        (b"/windows/system32", None),
    ],
)
def test_a_path_leads_where_the_disks_own_system_would_go(path: bytes, found: object) -> None:
    assert find(path) == found


def test_letters_large_and_small_are_the_same_where_they_are_and_one_name_fits() -> None:
    assert find(b"/windows/SYSTEM32", folds_case=True) == "dll"
    assert find("/WINDOWS/é".encode(), folds_case=True) == "accent"
    assert find(b"/Twin", folds_case=True) == "large"
    assert find(b"/TWIN", folds_case=True) is None


PART = st.sampled_from([b"a", b"b", b"..", b".", b"", b"c"])
LINK = st.lists(PART, max_size=5).map(b"/".join) | st.lists(PART, max_size=5).map(
    lambda parts: b"/" + b"/".join(parts)
)
NODES = st.recursive(
    st.text(max_size=1) | LINK, lambda inner: st.dictionaries(PART, inner, max_size=3)
)


@given(st.dictionaries(PART, NODES, max_size=3), st.lists(PART, max_size=6).map(b"/".join))
def test_no_tree_of_links_keeps_a_search_from_its_end(tree: Node, path: bytes) -> None:
    found = find_file(tree, path, children, target, folds_case=True)
    assert found is None or isinstance(found, dict | str | bytes)
