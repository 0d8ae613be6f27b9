# SPDX-License-Identifier: Apache-2.0
"""What an archive is compressed with: seen from its first bytes, never from its name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.restore.archive.gzipped import MAGIC as _GZIP_MAGIC
from vmapipe.restore.archive.inputs import Input
from vmapipe.restore.archive.zstdframes import is_zstd
from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.foreign import FOREIGN_COMPRESSIONS
from vmapipe.vma.layout import VMA_MAGIC

_LZOP_MAGIC = b"\x89LZO\0\r\n\x1a\n"
# lzop's header up to its flags is the longest.
MAGIC_BYTES = 32


class ReadOptions(NamedTuple):
    """`max_window_bytes`: memory that a zstd file may ask for; 0: as much as `zstd -d` takes.

    `salvage`: where the beginning is damaged, a file is compressed with what its name says.
    """

    max_window_bytes: int = 0
    salvage: bool = False


def compression_of(start: bytes) -> str:
    """What a file that begins so is compressed with; `none` for anything that is not known."""
    if is_zstd(start):
        return "zstd"
    if start.startswith(_GZIP_MAGIC):
        return "gzip"
    return "lzo" if start.startswith(_LZOP_MAGIC) else "none"


def salvaged_compression(name: str, start: bytes) -> str:
    """As `compression_of`; for a file whose beginning may be damaged, as its name says."""
    found = compression_of(start)
    if found == "none" and not start.startswith(VMA_MAGIC):
        endings = {".zst": "zstd", ".gz": "gzip"}
        found = next((kind for end, kind in endings.items() if name.endswith(end)), "none")
    return found


def is_compressed(name: str, start: bytes) -> bool:
    """Raises SourceError for what is known and cannot be read here."""
    for magic, (program, command) in FOREIGN_COMPRESSIONS.items():
        if start.startswith(magic):
            raise SourceError(
                f"{name} is compressed with {program}, which is not known here: "
                f"decompress it on the way, with exec:'{command} FILE'"
            )
    return compression_of(start) != "none"


def decompressed(
    name: str, source: Input, start: bytes, halts: Sequence[Cancel], options: ReadOptions
) -> tuple[io.RawIOBase, str]:
    """Plain bytes of what begins with `start`, and the name of its compression.

    Imports only what it needs: a restore's time begins with its imports.
    """
    if not options.salvage:
        is_compressed(name, start)  # refuses what is known and cannot be read
    compression = salvaged_compression(name, start) if options.salvage else compression_of(start)
    if compression == "none":
        return source, "none"
    if compression == "lzo":
        from vmapipe.restore.archive.lzopped import LzopStream

        return LzopStream(name, source, start, halts), compression
    from vmapipe.restore.archive.parts import Parts, PartStream

    kind: Parts
    if compression == "gzip":
        from vmapipe.restore.archive.gzipped import GzipMembers

        kind = GzipMembers()
    else:
        from vmapipe.restore.archive.zstd import DEFAULT_WINDOW_BYTES, ZstdParts

        kind = ZstdParts(options.max_window_bytes or DEFAULT_WINDOW_BYTES)
    return PartStream(name, source, kind), compression
