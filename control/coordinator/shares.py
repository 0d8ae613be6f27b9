# SPDX-License-Identifier: Apache-2.0
"""A speed limit of several disks: the part that each of them has. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Shares:
    """Equal parts for all disks that are not done; 0 is no limit.

    `in_turn`: the disks are read one after the other, and each has all of it.
    """

    def __init__(self, bytes_per_s: int, disks: Sequence[str], *, in_turn: bool = False) -> None:
        self.bytes_per_s = bytes_per_s
        self._active = dict.fromkeys(disks)
        self._in_turn = in_turn

    @property
    def share(self) -> int:
        """The share of each disk that is not done, rounded up: 1 byte a second of two disks is not 0."""
        return -(-self.bytes_per_s // (1 if self._in_turn else max(1, len(self._active))))

    @property
    def active(self) -> list[str]:
        return list(self._active)

    def done(self, disk: str) -> bool:
        """Take a disk out; tell whether the share of the others has changed."""
        before = self.share
        self._active.pop(disk, None)
        return bool(self._active) and self.share != before
