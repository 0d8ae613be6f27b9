# SPDX-License-Identifier: Apache-2.0
"""The catalogue in a SQLite file, for `vmapipe fleet run`, which needs no database."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence

from vmapipe.fleet.catalogue import Catalogue
from vmapipe.runtime.errors import Failure

# SQLite's writer waits so long for another one's transaction, which takes milliseconds.
_BUSY_S = 20.0


def open_file(path: str) -> Catalogue:
    """Open or make a catalogue in a SQLite file. Raises Failure."""
    folder = os.path.dirname(os.path.abspath(path))
    with _failing(path):
        try:
            os.makedirs(folder, mode=0o755, exist_ok=True)
            # Names and failures of machines are for its owner; SQLite's other files take its mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise Failure(f"cannot make the catalogue {path}: {error.strerror}") from error
        return Catalogue(_File(path))


@contextlib.contextmanager
def _failing(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Failure(
            f"the catalogue {path}: {error}; archives do not need it: with room and rights again, or "
            "after it was moved away, `vmapipe fleet rescan` makes it again from them"
        ) from error


class _File:
    """A SQLite database; every error becomes a Failure."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._depth = 0
        self._sqlite = sqlite3.connect(
            path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            # Readers (status, check, report) do not wait for a writer, nor it for them.
            self._sqlite.execute("PRAGMA journal_mode = WAL")
            self._sqlite.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            self._sqlite.close()
            raise

    def execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        with _failing(self._path):
            return self._sqlite.execute(sql, tuple(values))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Blocks in one another are one transaction."""
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._sqlite.in_transaction:
                self.execute("ROLLBACK")
            raise
        finally:
            self._depth = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with _failing(self._path):
            yield

    def close(self) -> None:
        self._sqlite.close()
