# SPDX-License-Identifier: Apache-2.0
"""The archive as it is stored, byte for byte, whatever is in it: what `--whole-file` compares."""

from __future__ import annotations

import os
from io import FileIO, RawIOBase

from vmapipe.restore.archive.source import Source
from vmapipe.restore.checks.digest import file_digest
from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.objectstore import is_object


def must_be_there_twice(source: Source) -> None:
    """Raises UsageError for what is gone once it was read."""
    if source.path is None and not is_object(source.name):
        raise UsageError(
            f"--whole-file: {source.name} can be read only once; verify the stored file"
        )


def stored_digest(source: Source, cancel: Cancel) -> tuple[int, bytes]:
    """(size in bytes, XXH3-128) of all of it, read once more. Raises SourceError, Cancelled."""
    try:
        with _open(source, cancel) as file:
            return file_digest(file, cancel.check)
    except OSError as error:
        raise SourceError(f"cannot read {source.name}: {os_error_text(error)}") from error


def _open(source: Source, cancel: Cancel) -> RawIOBase:
    if source.path is not None:
        file = FileIO(source.path)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file
    # Imported here: few archives are in a store.
    from vmapipe.restore.archive.object import ObjectInput, RemoteObject

    return ObjectInput(RemoteObject(source.name, (cancel,)), (cancel,))
