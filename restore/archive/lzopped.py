# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of .lzo files, through the program lzop (docs/decisions/0002-dependencies.md)."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence

from vmapipe.restore.archive.inputs import Input, ProgramInput
from vmapipe.restore.archive.parts import Proof
from vmapipe.restore.errors import CompressionError, SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

# As much as a pipe holds.
_PIECE_BYTES = 1 << 16


# Its header's fields in front of the flags: magic, three versions of 2 bytes, method, level.
# Older ones had neither the third version nor the level.
_VERSION_AT, _NEW_VERSION, _FLAGS_AT, _OLD_FLAGS_AT = 9, 0x0940, 17, 14
# Adler-32 or CRC-32 of each block's plain bytes.
_PLAIN_CHECKSUMS = 0x1 | 0x100


def has_checksums(start: bytes) -> bool:
    """Whether the .lzo file that begins so has checksums of its blocks' plain bytes."""
    version = int.from_bytes(start[_VERSION_AT : _VERSION_AT + 2], "big")
    at = _FLAGS_AT if version >= _NEW_VERSION else _OLD_FLAGS_AT
    return bool(int.from_bytes(start[at : at + 4], "big") & _PLAIN_CHECKSUMS)


class LzopStream(ProgramInput):
    """Owns `raw`, which a thread feeds to lzop. `start`: its first bytes."""

    def __init__(self, name: str, raw: Input, start: bytes, halts: Sequence[Cancel]) -> None:
        self.proof = Proof()
        self._has_checksums = has_checksums(start)
        lzop = shutil.which("lzop")
        if lzop is None:
            raise SourceError(
                f"{name} is compressed with lzop, and the program lzop is not installed"
            )
        self._raw = raw
        # The feeder must end before `raw` is closed, whatever it waits for.
        self._halt = Cancel()
        raw.also_halt(self._halt)
        stdin, self._to_lzop = os.pipe2(os.O_CLOEXEC)
        try:
            super().__init__(name, [lzop, "-dc"], halts, stdin=stdin, keep_words=True)
        except BaseException:
            os.close(self._to_lzop)
            self._halt.close()
            raise
        finally:
            os.close(stdin)
        self._feeder = threading.Thread(target=self._feed, name="lzop-feeder", daemon=True)
        self._feeder.start()

    def _read_fd(self, view: memoryview) -> int:
        got = super()._read_fd(view)
        # lzop compares a block with its checksum before it writes it.
        if self._has_checksums:
            self.proof.proven_bytes += got
        return got

    def _ended(self) -> None:
        super()._ended()
        self.proof.ended(self.proof.proven_bytes, has_checksum=self._has_checksums)

    def _feed(self) -> None:
        try:
            while data := self._raw.read(_PIECE_BYTES):
                view = memoryview(data)
                while view:
                    view = view[os.write(self._to_lzop, view) :]
        except BrokenPipeError:
            pass  # lzop has ended, and says itself why
        except Failure as error:
            self.failed_before = str(error)
        finally:
            os.close(self._to_lzop)

    def _failure(self, how: str) -> Exception:
        # lzop's own words are about anything; where it stopped is within what a pipe holds.
        return CompressionError(
            f"{self.name}: the lzo data is damaged or cut off: lzop {how}",
            file_offset=self._raw.position,
        )

    def close(self) -> None:
        if self.closed:
            return
        self._halt.ask("closed")
        super().close()
        self._feeder.join()
        self._raw.close()
        self._halt.close()
