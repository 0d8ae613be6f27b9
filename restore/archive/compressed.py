# SPDX-License-Identifier: Apache-2.0
"""What an archive is compressed with: seen from its first bytes, never from its name."""

from __future__ import annotations

import io
from collections.abc import Sequence

from vmapipe.restore.archive.inputs import Input
from vmapipe.restore.archive.zstdframes import is_zstd
from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel

_GZIP_MAGIC = b"\x1f\x8b"
_LZOP_MAGIC = b"\x89LZO\0\r\n\x1a\n"
# lzop's is the longest.
MAGIC_BYTES = len(_LZOP_MAGIC)
_FOREIGN = {
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
}


def is_compressed(name: str, start: bytes) -> bool:
    """Raises SourceError for what is known and cannot be read here."""
    for magic, (program, command) in _FOREIGN.items():
        if start.startswith(magic):
            raise SourceError(
                f"{name} is compressed with {program}, which is not known here: "
                f"decompress it on the way, with exec:'{command} FILE'"
            )
    return is_zstd(start) or start.startswith((_GZIP_MAGIC, _LZOP_MAGIC))


def decompressed(
    name: str, source: Input, start: bytes, halts: Sequence[Cancel]
) -> tuple[io.RawIOBase, str]:
    """Plain bytes of what begins with `start`, and the name of its compression.

    Imports only what it needs: a restore's time begins with its imports.
    """
    if not is_compressed(name, start):
        return source, "none"
    if start.startswith(_GZIP_MAGIC):
        from vmapipe.restore.archive.gzipped import GzipStream

        return GzipStream(name, source), "gzip"
    if start.startswith(_LZOP_MAGIC):
        from vmapipe.restore.archive.lzopped import LzopStream

        return LzopStream(name, source, halts), "lzo"
    from vmapipe.restore.archive.zstd import ZstdStream

    return ZstdStream(name, source), "zstd"
