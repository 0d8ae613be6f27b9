# SPDX-License-Identifier: Apache-2.0
"""Where a manifest goes: beside the archive, to a named place, or to whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.output import Output

if TYPE_CHECKING:
    from vmapipe.archiver.outputs.object import ObjectOutput

SUFFIX = ".manifest.json"
# Lines of 40 bytes are not worth a system call each.
_BUFFER_BYTES = 64 << 10


class ManifestSink(Protocol):
    """Takes a manifest line by line. Errors are Failures."""

    def line(self, text: str) -> None:
        """The next line, with its end."""

    def commit(self) -> None:
        """All lines are there."""

    def abandon(self) -> None:
        """Leave nothing behind, after a commit too. Never raises."""


class ManifestOutput:
    """Lines into an output, which is committed like an archive: a stream's cannot be taken back."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lines: list[bytes] = []
        self._length = 0
        self._committed = False

    def line(self, text: str) -> None:
        raw = text.encode()
        self._lines.append(raw)
        self._length += len(raw)
        if self._length >= _BUFFER_BYTES:
            self._flush()

    def commit(self) -> None:
        self._flush()
        self._output.commit()
        self._committed = True

    def abandon(self) -> None:
        self._output.abandon()
        if self._committed:
            self._committed = False
            self._remove()

    def _remove(self) -> None:
        """Take it back after its commit, if that can be. Never raises."""

    def _flush(self) -> None:
        lines, self._lines, self._length = self._lines, [], 0
        self._output.write([b"".join(lines)])


class ManifestFile(ManifestOutput):
    """A file. `replace`: one that exists is stale.

    That is so beside an archive that does not exist yet. A file that the user
    named is not replaced.
    """

    def __init__(self, path: str, *, replace: bool) -> None:
        self._file = FileOutput(path, replace=replace)
        super().__init__(self._file)

    def _remove(self) -> None:
        self._file.withdraw()


class ManifestObject(ManifestOutput):
    """An object of a store; `replace` as for a file.

    `prepare` is called before the commit: it sees to it that the archive can follow at once, and
    that nobody has made the same one meanwhile, whose manifest would not be stale.
    """

    def __init__(self, output: ObjectOutput, prepare: Callable[[], None]) -> None:
        super().__init__(output)
        self._object = output
        self._prepare = prepare

    def commit(self) -> None:
        self._prepare()
        super().commit()

    def _remove(self) -> None:
        self._object.remove()


class ManifestLines:
    """Hands each line to a function, for instance as an event."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take

    def line(self, text: str) -> None:
        self._take(text)

    def commit(self) -> None:
        """Whoever takes the lines knows the last one by its start."""

    def abandon(self) -> None:
        """What was said cannot be unsaid; the job's end tells that it failed."""


def beside(archive: str) -> str:
    """The path of an archive's manifest, or its object's name."""
    return archive + SUFFIX
