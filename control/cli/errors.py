# SPDX-License-Identifier: Apache-2.0
"""The words of an error at the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vmapipe.restore.archive.errors import RestoreError
from vmapipe.runtime.errors import Failure
from vmapipe.vma.errors import ArchiveError


def source_name(archive: str) -> str:
    return "standard input" if archive == "-" else archive


@contextlib.contextmanager
def naming(archive: str) -> Iterator[None]:
    """Add the archive's name to errors from code that does not know it."""
    try:
        yield
    except ArchiveError as error:
        failure = Failure(named(archive, error))
        failure.exit_code = error.exit_code
        raise failure from error


def named(archive: str, error: ArchiveError) -> str:
    """Return what is wrong with the archive, and its name once: what decompresses and decrypts names it, too."""
    return f"{source_name(archive)}: {str(error).removeprefix(f'{archive}: ')}{error.advice}"


def reference_words(error: ArchiveError | RestoreError) -> str:
    """The words that scripts look for, and ours behind them where they say more."""
    text = error.reference_text
    if not isinstance(error, ArchiveError):
        return text if str(error) == text else f"{text} ({error})"
    details = [error.text] if error.text != text else []
    if error.offset is not None:
        details.append(f"archive offset {error.offset}")
    text = f"{text} ({', '.join(details)})" if details else text
    return text + error.advice
