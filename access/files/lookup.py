# SPDX-License-Identifier: Apache-2.0
"""From a path to a file, as the system that wrote the disk would find it. Pure.

Links on the way are followed inside of the file system, whose root is their `/`; the last
name is taken as it is. On file systems of Windows and macOS large and small letters are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

File = TypeVar("File")
# As Linux (MAXSYMLINKS): more are a circle.
_MAX_LINKS = 40
# A path has 2048 at most, a made-up tree of links some more; each is a folder that is looked through.
_MAX_NAMES = 4096


def find_file(
    root: File,
    path: bytes,
    children: Callable[[File], Iterator[tuple[bytes, File]]],
    link_target: Callable[[File], bytes | None],
    *,
    folds_case: bool,
) -> File | None:
    """None: there is no such file. `children` gives nothing for what is not a folder.

    `.` and `..` are names of links only: whoever asks for a path has no need of them.
    """
    above = [root]
    names = deque((name, False) for name in path.split(b"/") if name)
    links = steps = 0
    while names:
        steps += 1
        name, is_of_link = names.popleft()
        if name in (b".", b".."):
            if not is_of_link:
                return None
            if name == b".." and len(above) > 1:
                above.pop()
            continue
        found = _child(children(above[-1]), name, folds_case)
        if found is None:
            return None
        target = link_target(found) if names else None
        if target is None:
            above.append(found)
            continue
        links += 1
        if links > _MAX_LINKS or steps > _MAX_NAMES:
            return None
        if target.startswith(b"/"):
            above = [root]
        names.extendleft((part, True) for part in reversed(target.split(b"/")) if part)
    return above[-1]


def _child(children: Iterator[tuple[bytes, File]], name: bytes, folds_case: bool) -> File | None:
    """That of exactly this name, or else the only one whose letters are the same."""
    alike: list[File] = []
    folded = _folded(name)
    for other, file in children:
        if other == name:
            return file
        if folds_case and _folded(other) == folded:
            alike.append(file)
    return alike[0] if len(alike) == 1 else None


def _folded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").casefold()
