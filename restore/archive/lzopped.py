# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of .lzo files, through the program lzop (docs/decisions/0002-dependencies.md)."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence

from vmapipe.restore.archive.inputs import Input, ProgramInput
from vmapipe.restore.errors import CompressionError, SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

# As much as a pipe holds.
_PIECE_BYTES = 1 << 16


class LzopStream(ProgramInput):
    """Owns `raw`, which a thread feeds to lzop."""

    def __init__(self, name: str, raw: Input, halts: Sequence[Cancel]) -> None:
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
