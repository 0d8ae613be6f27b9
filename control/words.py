# SPDX-License-Identifier: Apache-2.0
"""What an error says at the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vmapipe.runtime.errors import Failure
from vmapipe.vma.errors import ArchiveError


@contextlib.contextmanager
def naming(archive: str) -> Iterator[None]:
    """What is wrong with an archive comes from code that does not know its name: add it."""
    try:
        yield
    except ArchiveError as error:
        failure = Failure(f"{'standard input' if archive == '-' else archive}: {error}")
        failure.exit_code = error.exit_code
        raise failure from error
