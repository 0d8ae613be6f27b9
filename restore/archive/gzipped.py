# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of gzip files of any number of members."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING

from vmapipe.restore.archive.inputs import Input
from vmapipe.restore.errors import CompressionError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class GzipStream(io.RawIOBase):
    """Owns `raw`. Zero bytes after the last member are padding, as for gzip itself."""

    def __init__(self, name: str, raw: Input) -> None:
        super().__init__()
        self._name = name
        self._raw = raw
        self._plain = gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 17), mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            return self._plain.readinto(buffer)
        except EOFError as error:
            raise CompressionError(
                f"{self._name} is cut off inside its gzip data", file_offset=self._raw.position
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise CompressionError(
                f"{self._name}: the gzip data is damaged, or garbage follows it: {error}",
                file_offset=self._raw.position,
            ) from error

    def close(self) -> None:
        self._plain.close()
        self._raw.close()
        super().close()
