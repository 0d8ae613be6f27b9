# SPDX-License-Identifier: Apache-2.0
"""The catalogue of a fleet: machines, archives, runs, verifications, drills, and where each task stands.

One SQL for two stores: a SQLite file (sqlite_file.py), which `vmapipe fleet run` needs and nothing else,
and tables of PostgreSQL, whose connection `engine.py` brings. No restore ever needs a catalogue: it can
be made again from the archives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from vmapipe.fleet.records import (
    AHEAD_S,
    ENDED,
    KEPT_S,
    ArchiveRecord,
    CancelRecord,
    DrillRecord,
    HostRecord,
    MachineRecord,
    PictureRecord,
    Record,
    RunRecord,
    Standing,
    Verb,
    VerificationRecord,
)
from vmapipe.runtime.errors import Failure

R = TypeVar("R", bound=Record)

_TABLES: Mapping[type[Any], tuple[str, tuple[str, ...]]] = {
    MachineRecord: ("machines", ("machine",)),
    ArchiveRecord: ("archives", ("machine", "target", "archive")),
    RunRecord: ("runs", ("run",)),
    VerificationRecord: ("verifications", ("machine", "target", "archive", "checked_s")),
    DrillRecord: ("drills", ("machine", "target", "archive", "tested_s")),
    Standing: ("standings", ("machine", "verb", "target")),
    CancelRecord: ("cancels", ("run",)),
    HostRecord: ("hosts", ("host",)),
    PictureRecord: ("pictures", ("machine", "target")),
}
_GONE = (
    "NOT EXISTS (SELECT 1 FROM archives a WHERE a.machine = {0}.machine AND a.target = {0}.target "
    "AND a.archive = {0}.archive AND a.removed_s = 0)"
)
# A page has room for 12 MiB of pictures.
_MOST_PICTURES = 300
_TESTED = (
    "EXISTS (SELECT 1 FROM {0} t WHERE t.machine = archives.machine AND t.target = archives.target "
    "AND t.archive = archives.archive)"
)
_INDEXES = (
    ("runs", "state", ""),
    ("runs", "machine", ""),
    ("runs", "ended_s", ""),
    ("archives", "stored_s", ""),
    # After a year a dozen are gone for each that is there.
    ("archives", "machine", " WHERE removed_s = 0"),
)
_SQL_TYPES: Mapping[object, str] = {int: "BIGINT", float: "DOUBLE PRECISION", bool: "BIGINT"}
# A year in which nobody reads it; of a column together, far above a site's with exabytes, and its words.
_MOST_TIME_S, _MOST_NUMBER, _MOST_TEXT_CHARS = 2.5e11, 1e30, 1 << 31


class Rows(Protocol):
    """What both databases' cursors have."""

    def fetchall(self) -> Sequence[Sequence[Any]]: ...


class Database(Protocol):
    """A database: `execute` takes `?` for values, `transaction` commits or takes back its block.

    `reading` takes no lock: what its block reads is for one question. All errors are Failure.
    """

    def execute(self, sql: str, values: Sequence[object] = ()) -> Rows: ...
    def transaction(self) -> contextlib.AbstractContextManager[object]: ...
    def reading(self) -> contextlib.AbstractContextManager[object]: ...
    def close(self) -> None: ...


class Catalogue:
    """The records of a fleet. Threads may share it. Every call raises Failure."""

    def __init__(self, connection: Database) -> None:
        self._database = connection
        self._lock = threading.RLock()
        with self._lock, connection.transaction():
            for record in _TABLES:
                connection.execute(_create(record))
            for table, column, of in _INDEXES:
                name = f"{table}_{column}"
                connection.execute(f"CREATE INDEX IF NOT EXISTS {name} ON {table} ({column}){of}")

    def close(self) -> None:
        self._database.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that its block writes is there afterwards, or nothing of it."""
        with self._lock, self._database.transaction():
            yield

    # --- Records ---

    def put(self, *records: Record) -> None:
        """Store records; one of the same key is replaced."""
        with self.transaction():
            for record in records:
                kind = type(record)
                values = [_stored(getattr(record, name)) for name, _ in _COLUMNS[kind]]
                self._database.execute(_UPSERTS[kind], values)

    def select(
        self, record: type[R], order: str = "", limit: int = 0, **equal: str | float | Sequence[str]
    ) -> list[R]:
        """Return the records whose fields have these values, or one of a list of them.

        `order`: the field that they are sorted by, `-field`: the other way round.
        """
        words, values = self._conditions(record, equal)
        tail = ""
        if order:
            tail += f" ORDER BY {_known(record, order.lstrip('-'))}{' DESC' * (order[0] == '-')}"
        if limit:
            tail += f" LIMIT {int(limit)}"
        return self._select(record, words, values, tail)

    def select_since(
        self, record: type[R], least: Mapping[str, float], **equal: str | float | Sequence[str]
    ) -> list[R]:
        """Return those of `select` whose fields in `least` have this value or more."""
        words, values = self._conditions(record, equal)
        words += [f"{_known(record, field)} >= ?" for field in least]
        return self._select(record, words, [*values, *least.values()])

    def archives_since(self, from_s: float) -> list[ArchiveRecord]:
        """Return the archives that are there, and those that were stored since then, though they are gone."""
        return self._select(ArchiveRecord, ["(removed_s = 0 OR stored_s >= ?)"], [from_s])

    def telling_archives(self, until_s: float) -> list[ArchiveRecord]:
        """Return those archives that are there and say how safe their machines are.

        They are each machine's first and last one, the last of those that claim to be older than `until_s`, and
        all that were verified or booted: of 300,000 some ten thousand.
        """
        at = "CASE WHEN instant_s > 0 THEN instant_s ELSE stored_s END"
        ends = (
            f"SELECT machine AS of_machine, MIN({at}) AS first_s, MAX({at}) AS last_s, MAX(stored_s) AS late_s, "
            f"MAX(CASE WHEN {at} <= ? THEN {at} END) AS dated_s FROM archives WHERE removed_s = 0 GROUP BY machine"
        )
        tells = (
            f"({at} IN (first_s, last_s, dated_s) OR stored_s = late_s "
            f"OR {_TESTED.format('verifications')} OR {_TESTED.format('drills')})"
        )
        join = f" JOIN ({ends}) ends ON of_machine = machine"
        return self._select(ArchiveRecord, ["removed_s = 0", tells], [until_s], joined=join)

    def tests_of_what_is_there(self, record: type[R]) -> list[R]:
        """Return the verifications, or the restore tests, of archives that are there."""
        table, _ = _TABLES[record]
        return self._select(record, [f"NOT {_GONE.format(table)}"], [])

    def _conditions(
        self, record: type[R], equal: Mapping[str, str | float | Sequence[str]]
    ) -> tuple[list[str], list[object]]:
        words, values = list[str](), list[object]()
        for name, value in equal.items():
            known = _known(record, name)
            options = [value] if isinstance(value, str | int | float) else list(value)
            words.append(f"{known} IN ({', '.join('?' * len(options))})" if options else "1 = 0")
            values += options
        return words, values

    def _select(
        self,
        record: type[R],
        words: Sequence[str],
        values: Sequence[object],
        tail: str = "",
        joined: str = "",
    ) -> list[R]:
        table, _ = _TABLES[record]
        names = [field.name for field in dataclasses.fields(record)]
        where = f" WHERE {' AND '.join(words)}" if words else ""
        sql = f"SELECT {', '.join(names)} FROM {table}{joined}{where}{tail}"
        # A status or a report must not wait for whoever writes, nor hold it up.
        with self._lock, self._database.reading():
            rows = self._database.execute(sql, values).fetchall()
        _check_columns(record, rows)
        return [record(*row) for row in rows]

    def remove(self, record: type[Record], **equal: str) -> None:
        table, _ = _TABLES[record]
        words = " AND ".join(f"{_known(record, name)} = ?" for name in equal) or "1 = 1"
        with self.transaction():
            self._database.execute(f"DELETE FROM {table} WHERE {words}", list(equal.values()))

    def forget_old(self, now_s: float) -> int:
        """Remove what is older than `KEPT_S` and no longer needed; return how many records that were.

        What is there now stays, however old: archives, machines that have not vanished, where tasks stand.
        """
        before_s = now_s - KEPT_S
        conditions = (
            ("runs", "ended_s > 0 AND ended_s < ?"),
            ("archives", "removed_s > 0 AND removed_s < ?"),
            ("machines", "vanished_s > 0 AND vanished_s < ?"),
            # Of an archive that is still there the tests are kept: the last one says what it is worth.
            ("verifications", f"checked_s < ? AND {_GONE.format('verifications')}"),
            ("drills", f"tested_s < ? AND {_GONE.format('drills')}"),
            ("standings", "ended_s < ? AND failed_s < ? AND NOT EXISTS (SELECT 1 FROM machines WHERE "
             "machines.machine = standings.machine)"),
        )  # fmt: skip
        count = 0
        with self.transaction():
            for table, words in conditions:
                values = [before_s] * words.count("?")
                (found,) = self._database.execute(
                    f"SELECT count(*) FROM {table} WHERE {words}", values
                ).fetchall()[0]
                if found:
                    self._database.execute(f"DELETE FROM {table} WHERE {words}", values)
                    count += int(found)
            latest = f"SELECT tested_s FROM pictures ORDER BY tested_s DESC LIMIT {_MOST_PICTURES}"
            self._database.execute(
                f"DELETE FROM pictures WHERE tested_s < (SELECT MIN(tested_s) FROM ({latest}) latest)"
            )
        return count

    # --- Runs ---

    def standings(self) -> dict[tuple[str, Verb, str], Standing]:
        """Return where each task stands, by machine, verb and target."""
        return {(s.machine, s.verb, s.target): s for s in self.select(Standing)}

    def running(self) -> list[RunRecord]:
        """Return the runs that have not ended, as far as is known."""
        return self.select(RunRecord, "planned_s", state=("waiting", "running"))

    def beat(self, run: str, now_s: float, done: int, total: int, rate: float) -> None:
        """Note the progress of a run that has not ended."""
        with self.transaction():
            self._database.execute(
                "UPDATE runs SET seen_s = ?, done_bytes = ?, total_bytes = ?, rate_bytes_s = ? "
                "WHERE run = ? AND state IN ('waiting', 'running')",
                [now_s, done, total, rate, run],
            )

    def finish(self, run: RunRecord, *results: Record) -> bool:
        """Store the end of a run with what it brought; False: another one has told its end before.

        Doing it twice changes nothing: a job that is told again after a lost answer is counted once.
        """
        if run.state not in ENDED:
            raise ValueError(f"{run.state} is not the end of a run")
        with self.transaction():
            before = self.select(RunRecord, run=run.run)
            if before and before[0].state in ENDED and before[0].state != "lost":
                return False
            old = self.select(Standing, machine=run.machine, verb=run.verb, target=run.target) or [
                Standing(run.machine, run.verb, run.target)
            ]
            self.put(run, *results, after(old[0], run))
        return True


def after(standing: Standing, run: RunRecord) -> Standing:
    """Return where a task stands after the end of a run. Pure.

    One that somebody has cancelled waits like a failed one; one that was lost is due again at once.
    """
    if run.state == "done":
        # One that a wrong clock has put into the future must not hide those that are done now.
        if run.started_s < standing.done_s <= run.ended_s + AHEAD_S:
            return standing
        return Standing(run.machine, run.verb, run.target, run.started_s, run.ended_s, run.archive)
    if run.state in ("failed", "cancelled"):
        return dataclasses.replace(
            standing, failures=standing.failures + 1, failed_s=run.ended_s, text=run.text
        )
    return standing


def _check_columns(record: type[Any], rows: Sequence[Sequence[Any]]) -> None:
    """Raises Failure for what no catalogue of ours has: SQLite takes anything, and both take endless numbers.

    A column at a time: a report has hundreds of thousands of rows.
    """
    for (name, kind), column in zip(_COLUMNS[record], zip(*rows, strict=True), strict=False):
        try:
            if kind == "TEXT":
                is_valid = len("".join(column)) < _MOST_TEXT_CHARS
            else:
                is_valid = -_MOST_NUMBER <= sum(column) <= _MOST_NUMBER and max(column) < (
                    _MOST_TIME_S if name.endswith("_s") and "bytes" not in name else _MOST_NUMBER
                )
        except (TypeError, OverflowError):
            is_valid = False
        if not is_valid:
            raise Failure(
                f"the catalogue's {_TABLES[record][0]} have {name} that cannot be; archives do not need it: "
                "after it was moved away, `vmapipe fleet rescan` makes it again from them"
            )


def _columns_of(record: type[Any]) -> list[tuple[str, str]]:
    hints = typing.get_type_hints(record)
    return [(f.name, _SQL_TYPES.get(hints[f.name], "TEXT")) for f in dataclasses.fields(record)]


_COLUMNS = {record: _columns_of(record) for record in _TABLES}


def _create(record: type[Record]) -> str:
    table, key = _TABLES[record]
    columns = ", ".join(f"{name} {kind} NOT NULL" for name, kind in _COLUMNS[record])
    return f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY ({', '.join(key)}))"


def _upsert(record: type[Any]) -> str:
    table, key = _TABLES[record]
    names = [field.name for field in dataclasses.fields(record)]
    changes = ", ".join(f"{name} = excluded.{name}" for name in names if name not in key)
    return (
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
        f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}"
    )


_UPSERTS = {record: _upsert(record) for record in _TABLES}


def _known(record: type[Any], name: str) -> str:
    """Return a field's name; whatever else comes is not for SQL. Raises ValueError."""
    if name not in [field.name for field in dataclasses.fields(record)]:
        raise ValueError(f"{record.__name__} has no field {name}")
    return name


def _stored(value: object) -> object:
    """A text without what a database refuses: NUL, and halves of characters (names may be any bytes)."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and ("\0" in value or not value.isascii()):
        return value.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
    return value
