# SPDX-License-Identifier: Apache-2.0
"""What every place for an archive can do, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffers = Sequence[bytes | memoryview]


class Output(Protocol):
    """Takes the bytes of one archive. One thread writes and commits.

    Errors are `Failure`s whose text is the line for the user. After the first
    one only `abandon` makes sense. `abandon` alone may be called from any
    thread, while a write or a commit is under way too.
    """

    @property
    def description(self) -> str:
        """The target as the user named it; it stands in every message."""

    @property
    def is_stream(self) -> bool:
        """Whether the bytes are gone once written: no name, and nothing to take back."""

    @property
    def written_bytes(self) -> int:
        """Bytes that have left for the target so far. Any thread may read it."""

    def write(self, buffers: Buffers) -> None:
        """Write all of the buffers, in order; wait as long as that takes.

        When it returns, nobody looks at the buffers any more: their memory may
        be used again.
        """

    def commit(self) -> None:
        """Bring everything to its place: on disk and under its name, or to the far end."""

    def abandon(self) -> None:
        """Leave nothing behind. Quick; never raises; after a commit it does nothing.

        A write or commit that waits in another thread ends with a Failure.
        Where the kernel will not let go of it (a dead disk, a tape), this
        returns all the same, within `ending.ABANDON_WAIT_S`.
        """
