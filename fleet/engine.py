# SPDX-License-Identifier: Apache-2.0
"""The engine: Procrastinate's queue and the catalogue, in one PostgreSQL (docs/decisions/0036-fleet-engine.md).

A queue has a host's name, and holds only what may start. A job that is not known to the catalogue any more
is dropped by whoever gets it, and a run whose job is gone is lost, and due again: so either may be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

try:
    import procrastinate
    import procrastinate.exceptions
    import psycopg
except ImportError as error:
    from vmapipe.runtime.errors import Failure

    raise Failure(
        f"fleet serve, fleet worker and --database need Procrastinate ({error}): pip install "
        "'vmapipe[fleet]', and apt install postgresql (its library libpq)"
    ) from error

from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.postgres import DISK_FULL
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import one_line, without_user

TASK = "vmapipe.job"
#: A worker that has told nothing for so long is dead (Procrastinate's own default).
STALLED_S = 30.0
_CONNECT_S = 10
# How often a worker looks whether it still has its lock; another one that wants it tries every 2 s.
_HOLD_S = 5.0
# Numbers of ours among PostgreSQL's advisory locks.
_LOCK_SCHEMA, _LOCK_SERVE, _LOCK_WORKER = 0x766D6131, 0x766D6132, 0x766D6133
# The database's clock may be set, too.
_CLOCK_S = 60.0
# A host that has failed holds its worker's lock until the database misses it.
_KEEPALIVES = (
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)

Job = Callable[[Mapping[str, Any], threading.Event], None]


class DatabaseLost(Failure):
    """The database cannot be reached, or does not do what it should; trying again may help."""


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (psycopg.Error, procrastinate.exceptions.ConnectorException) as error:
        words = str(error).strip().replace("\n", " ") or type(error).__name__
        cause = one_line(str(error.__cause__).strip().replace("\n", " "), 300)
        # A password with an @ in it that is not written %40 is taken for a part of the host.
        words = re.sub(r"'[^'@]*@", "'…@", words)
        more = f" ({cause})" if error.__cause__ is not None else ""
        if isinstance(error, psycopg.errors.DiskFull):
            words, more = words.partition(" HINT:")[0], f": {DISK_FULL}"
        raise DatabaseLost(
            f"the fleet's database: {one_line(words, 500)}{more}; archives do not need it"
        ) from error


class _Postgres:
    """A connection as the catalogue wants it."""

    def __init__(self, dsn: str) -> None:
        try:
            with _failing():
                self.connection = psycopg.connect(
                    dsn,
                    autocommit=True,
                    connect_timeout=_CONNECT_S,
                    application_name="vmapipe fleet",
                )
        except DatabaseLost as failure:
            if isinstance(failure.__cause__, psycopg.ProgrammingError):
                # Its words may have the password; trying again would not help.
                raise Failure(
                    "what was given for a database cannot be understood: postgresql://USER@HOST/NAME, or "
                    "words such as host=b1 dbname=fleet user=vmapipe; a password stands in ~/.pgpass"
                ) from None
            raise

    def execute(self, sql: str, values: Sequence[object] = ()) -> psycopg.Cursor[Any]:
        with _failing():
            return self.connection.execute(sql.replace("?", "%s").encode(), values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with _failing(), self.connection.transaction():
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with _failing():
            yield

    def close(self) -> None:
        self.connection.close()


class DatabaseCatalogue(Catalogue):
    """The catalogue in PostgreSQL, with the database's clock."""

    def __init__(self, dsn: str) -> None:
        """Connect, and make what is not there. Raises Failure."""
        self.postgres = _Postgres(dsn)
        try:
            execute = self.postgres.execute
            # Two that make the same table at the same time would disturb each other.
            execute("SELECT pg_advisory_lock(?)", [_LOCK_SCHEMA])
            super().__init__(self.postgres)
            execute("SELECT pg_advisory_unlock(?)", [_LOCK_SCHEMA])
            self._ask_clock()
        except BaseException:
            self.postgres.close()
            raise

    def now_s(self) -> float:
        """Return the time by the database's clock, the same for all hosts however theirs differ, or are set."""
        if time.clock_gettime(time.CLOCK_BOOTTIME) - self._asked_s >= _CLOCK_S:
            # Else the last answer stands: an end must not be lost for want of its time.
            with contextlib.suppress(Failure):
                self._ask_clock()
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self._ahead_s

    def _ask_clock(self) -> None:
        (now,) = self.postgres.execute(
            "SELECT extract(epoch FROM clock_timestamp())::float8"
        ).fetchall()[0]
        self._asked_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._ahead_s = float(now) - self._asked_s


def shown(dsn: str) -> str:
    """Return a DSN for people: without user and password."""
    return one_line(without_user(dsn.partition("password")[0].strip()), 200)


def open_database(dsn: str) -> DatabaseCatalogue:
    """Raises Failure."""
    return DatabaseCatalogue(dsn)


def has_queue(catalogue: DatabaseCatalogue) -> bool:
    """Tell whether a server has made its queue there. Raises Failure."""
    found = catalogue.postgres.execute("SELECT to_regclass('procrastinate_jobs') IS NOT NULL")
    return bool(found.fetchall()[0][0])


def _app(connector: Any) -> procrastinate.App:
    return procrastinate.App(connector=connector)


class JobQueue:
    """The queue as `fleet serve` sees it: a carrier of requests. Every call raises Failure."""

    def __init__(self, dsn: str, catalogue: DatabaseCatalogue) -> None:
        """Raises Failure also where another server is at work."""
        self._catalogue = catalogue
        (got,) = catalogue.postgres.execute(
            "SELECT pg_try_advisory_lock(?)", [_LOCK_SERVE]
        ).fetchall()[0]
        if not got:
            raise Failure("another `vmapipe fleet serve` is at work with this database")
        self._app = _app(procrastinate.SyncPsycopgConnector(conninfo=dsn))
        with _failing():
            self._app.open()
            if not has_queue(catalogue):
                self._app.schema_manager.apply_schema()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._app.close()

    def start(self, run: str, host: str, request: Mapping[str, Any]) -> None:
        deferrer = self._app.configure_task(TASK, queue=host, queueing_lock=run)
        with _failing(), contextlib.suppress(procrastinate.exceptions.AlreadyEnqueued):
            deferrer.defer(run=run, request=dict(request))

    def cancel(self, run: str) -> None:
        rows = self._catalogue.postgres.execute(
            "SELECT id FROM procrastinate_jobs WHERE args->>'run' = ? AND status IN ('todo', 'doing')",
            [run],
        ).fetchall()
        with _failing():
            for (number,) in rows:
                self._app.job_manager.cancel_job_by_id(int(number), abort=True)

    def live(self) -> set[str]:
        """Return the runs that have a job; jobs of workers that are dead are dropped before."""
        execute = self._catalogue.postgres.execute
        dead = execute(
            "SELECT j.id FROM procrastinate_jobs j LEFT JOIN procrastinate_workers w "
            "ON w.id = j.worker_id WHERE j.status = 'doing' AND (w.id IS NULL OR "
            "w.last_heartbeat < now() - ? * interval '1 second')",
            [STALLED_S],
        ).fetchall()
        for (number,) in dead:
            execute("DELETE FROM procrastinate_jobs WHERE id = ? AND status = 'doing'", [number])
        execute("DELETE FROM procrastinate_jobs WHERE status NOT IN ('todo', 'doing')")
        rows = execute(
            "SELECT args->>'run' FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
        ).fetchall()
        return {str(run) for (run,) in rows}


async def _work(
    dsn: str, host: str, concurrency: int, do: Job, cancel: Cancel, holds: Callable[[], object]
) -> None:
    # One connection that waits for news, and those of the jobs that begin and end.
    app = _app(procrastinate.PsycopgConnector(conninfo=dsn, min_size=1, max_size=4, timeout=5.0))

    @app.task(name=TASK, queue=host)
    async def job(run: str, request: dict[str, Any]) -> None:
        stop = threading.Event()
        work = asyncio.ensure_future(asyncio.to_thread(do, {"run": run, "request": request}, stop))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # The child is told, and its end waited for: only then the job is over.
            stop.set()
            await asyncio.wait([work])
            raise

    async def stay() -> None:
        async with app.open_async():
            await app.run_worker_async(
                queues=[host],
                name=f"vmapipe {host}",
                concurrency=concurrency,
                fetch_job_polling_interval=2.0,
                abort_job_polling_interval=1.0,
                # A job is told to end, and has a minute for it.
                shutdown_graceful_timeout=0.1,
                update_heartbeat_interval=STALLED_S / 6,
                stalled_worker_timeout=STALLED_S,
                delete_jobs="always",
                # A signal is a wish of ours, also while the database is away.
                install_signal_handlers=False,
            )

    async def hold() -> None:
        # The pool connects anew by itself; the lock of a host's only worker went with its connection.
        while True:
            await asyncio.sleep(_HOLD_S)
            await asyncio.to_thread(holds)

    working, holding = asyncio.ensure_future(stay()), asyncio.ensure_future(hold())
    loop = asyncio.get_running_loop()
    # What breaks beside the work when a database is lost is the same loss, which the work tells.
    loop.set_exception_handler(lambda loop, context: None)

    def end_once() -> None:
        # The descriptor stays readable: a second cancel would end the tidying up, and a third one.
        loop.remove_reader(cancel.fd)
        working.cancel()

    loop.add_reader(cancel.fd, end_once)
    try:
        await asyncio.wait([working, holding], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait([working])
            holding.result()
        working.result()
    except asyncio.CancelledError:
        if not cancel.asked:
            raise
    finally:
        holding.cancel()
        loop.remove_reader(cancel.fd)


def run_worker(
    dsn: str,
    host: str,
    concurrency: int,
    do: Job,
    cancel: Cancel,
    begun: Callable[[], None],
    *,
    is_again: bool = False,
) -> None:
    """Do a host's jobs until `cancel`. Raises Failure when the database is lost.

    `begun` is called when this is the host's only worker. `is_again`: this process was its worker
    before, and lost the database.
    """
    for name in ("psycopg.pool", "procrastinate"):
        # What they have to say is said by what they raise; what a job says, by us.
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    # A pool would wait for half a minute, and stay deaf.
    catalogue = open_database(dsn)
    try:
        for setting in _KEEPALIVES:
            catalogue.postgres.execute(setting)
        # Held by this connection for as long as we work: two would take each other's jobs for lost.
        (got,) = catalogue.postgres.execute(
            "SELECT pg_try_advisory_lock(?::int4, hashtext(?))", [_LOCK_WORKER, host]
        ).fetchall()[0]
        if not got:
            raise DatabaseLost(
                f"another `vmapipe fleet worker --host {host}` is at work with this database; this "
                "one takes over when that ends"
            )
        if not has_queue(catalogue):
            raise DatabaseLost(
                "the fleet's database has no queue yet: `vmapipe fleet serve` makes it, and has not been "
                "there"
            )
        begun()
        if is_again:
            # Ours, which have ended when the database was lost: nobody has to wait for their heartbeat.
            catalogue.postgres.execute(
                "DELETE FROM procrastinate_jobs WHERE queue_name = ? AND status = 'doing'", [host]
            )
        with _failing():
            asyncio.run(
                _work(
                    *(dsn, host, concurrency, do, cancel),
                    lambda: catalogue.postgres.execute("SELECT 1"),
                )
            )
    finally:
        catalogue.close()


def request_of_job(job: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the run and the request of a job as it came out of the queue. Raises Failure."""
    run, request = job.get("run"), job.get("request")
    if not isinstance(run, str) or not isinstance(request, dict):
        raise Failure(f"a job that is none: {one_line(json.dumps(job, default=str), 200)}")
    return run, request
