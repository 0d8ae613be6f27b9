# SPDX-License-Identifier: Apache-2.0
"""A private PostgreSQL of `vmapipe fleet serve`: on a Unix socket in its own folder, and gone with its parent.

The programs are Debian's (package postgresql); the service that the package starts is another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from typing import IO

from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.text import one_line

_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")
# Who it runs as when we are root, which PostgreSQL refuses to.
_USERS = ("postgres", "nobody")
_START_S, _INITDB_S, _STOP_S = 60.0, 120.0, 20.0
# A second apart, for the end of another one.
_TRIES = 15
_ENDS_YET = 'lock file ".*" already exists|shared memory block .* still in use'
# sun_path has 108 bytes; `/.s.PGSQL.5432` and its zero are 15 of them.
_MOST_PATH_BYTES = 93
# A segment of its write-ahead log: with less room it neither starts nor goes on.
_LEAST_BYTES = 16 << 20
#: What is said, and what can be done, where it has no room.
DISK_FULL = "its disk is full: with room again it goes on"
NAME, USER = "postgres", "vmapipe"


class PrivatePostgres:
    """Use it as a context manager. `dsn` says how to connect; `is_alive` whether it still runs."""

    def __init__(self, folder: str) -> None:
        """Raises Failure where it cannot be: no programs, a path that is too long."""
        self._folder = os.path.abspath(folder)
        if len(os.fsencode(self._folder)) > _MOST_PATH_BYTES:
            raise Failure(
                f"{self._folder}: the path of a Unix socket has at most 107 bytes: --state with a "
                "shorter one"
            )
        self._bin = _programs(_version(f"{self._folder}/data"), self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def dsn(self) -> str:
        return private_dsn(self._folder)

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> PrivatePostgres:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, for the first time with a new cluster. Raises Failure."""
        self.stop()
        data = f"{self._folder}/data"
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                user = _unprivileged()
                os.chown(self._folder, user.pw_uid, user.pw_gid)
        except OSError as error:
            raise Failure(f"{self._folder}: {error.strerror}") from error
        if not os.path.exists(f"{data}/PG_VERSION"):
            self._make_whole_cluster(data)
        for left in reversed(range(_TRIES)):
            self._log = self._open_log()
            self._process = self._started(data)
            try:
                self._wait()
                return
            except Failure:
                # The one of a server that was killed just now ends, but not at once.
                if not left or not re.search(_ENDS_YET, self._last_words()):
                    raise
                time.sleep(1)

    def _open_log(self) -> IO[bytes]:
        try:
            return open(f"{self._folder}/postgres.log", "ab")
        except OSError as error:
            raise Failure(f"{self._folder}: {error.strerror}") from error

    def _started(self, data: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *self._as_user(),
                f"{self._bin}/postgres",
                *("-D", data, "-k", self._folder),
                *("-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"),
                # A fleet's figures are some MiB.
                *("-c", "shared_buffers=32MB", "-c", "max_connections=400"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            cwd="/",
        )

    def _as_user(self) -> list[str]:
        """Return the words that give up root's rights, and end it in order when this process dies."""
        words = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            user = _unprivileged()
            words += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        return words

    def _make_whole_cluster(self, data: str) -> None:
        """Make a cluster beside, then give it its name: what has the name is whole, the other is ours to remove."""
        half = f"{data}.new"
        if os.path.lexists(data):
            raise Failure(
                f"{data} is there and is not a whole PostgreSQL; vmapipe leaves no half one under that "
                "name: move it away, or name another folder with --state"
            )
        try:
            fd = os.open(f"{half}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                # initdb has it, too: that of a server that was killed just now ends, but not at once.
                self._wait_for_lock(fd)
                if os.path.lexists(half):
                    shutil.rmtree(half)
                self._make_cluster(half, fd)
                os.rename(half, data)
            finally:
                os.close(fd)
        except OSError as error:
            raise Failure(
                f"{self._folder}: no PostgreSQL could be made there: {os_error_text(error)} "
                "(--state names another folder)"
            ) from error

    def _wait_for_lock(self, fd: int) -> None:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not left:
                    raise Failure(
                        f"{self._folder}: another `vmapipe fleet serve` is making a PostgreSQL there"
                    ) from None
            time.sleep(1)

    def _make_cluster(self, data: str, lock: int) -> None:
        words = [
            *self._as_user(),
            f"{self._bin}/initdb",
            *("-D", data, "-U", USER, "-E", "UTF8", "--locale=C.UTF-8"),
            # Whoever may reach the socket, in a folder of 0700, is root or this user.
            *("--auth-local=trust", "--auth-host=reject"),
        ]
        try:
            done = subprocess.run(
                words,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_INITDB_S,
                cwd="/",
                pass_fds=(lock,),
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{self._folder}: initdb took more than {_INITDB_S:.0f} s") from None
        except OSError as error:
            raise Failure(
                f"cannot start setpriv: {error.strerror} (apt install util-linux)"
            ) from error
        if done.returncode:
            text = one_line(done.stderr.decode(errors="replace").strip().replace("\n", " "), 1000)
            way = f"the user {_owner_name()} has to reach that folder (--state names another one)"
            way = DISK_FULL if self._is_full(text) else way
            raise Failure(f"{self._folder}: no PostgreSQL could be made there: {text}; {way}")

    def _wait(self) -> None:
        """Wait until it takes connections. Raises Failure."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if not self.is_alive:
                self.stop()
                words = self._last_words()
                way = "another `vmapipe fleet serve` there? postgres.log has more"
                way = DISK_FULL if self._is_full(words) else way
                raise Failure(f"{self._folder}: PostgreSQL did not start: {words} ({way})")
            done = subprocess.run(
                [f"{self._bin}/pg_isready", "-q", "-h", self._folder, "-U", USER, "-d", NAME],
                stdin=subprocess.DEVNULL,
            )
            if done.returncode == 0:
                return
            time.sleep(0.1)
        self.stop()
        raise Failure(f"{self._folder}: PostgreSQL did not answer within {_START_S:.0f} s")

    def _last_words(self) -> str:
        try:
            with open(f"{self._folder}/postgres.log", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return "no log"
        # Without time and process: the same trouble is the same words.
        told = [
            found[0] for found in map(re.compile("(FATAL|ERROR|PANIC).*").search, lines) if found
        ]
        return one_line((told or lines or ["no log"])[-1], 500)

    def _is_full(self, words: str) -> bool:
        """Tell whether there is no room; its log, which would say so, may be on the same disk."""
        room = os.statvfs(self._folder)
        return "No space left" in words or room.f_bavail * room.f_frsize < _LEAST_BYTES

    def stop(self) -> None:
        """End it, with its connections."""
        if self._process is not None:
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_S)
                    break
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def private_dsn(folder: str) -> str:
    """Return how to connect to the PostgreSQL of a `fleet serve` with this folder."""
    return f"host={os.path.abspath(folder)} dbname={NAME} user={USER}"


def _version(data: str) -> str:
    """Return the major version that a cluster is of; empty: there is none yet."""
    try:
        with open(f"{data}/PG_VERSION") as file:
            return one_line(file.read(16).strip())
    except (OSError, ValueError):
        return ""


def _programs(version: str = "", folder: str = "") -> str:
    """Return the folder of the newest programs, or of those of a cluster's version. Raises Failure."""
    found = [place for pattern in _PLACES for place in glob.glob(pattern)]
    versions = {
        re.findall(r"[0-9.]+", place)[-1]: place
        for place in found
        if os.access(f"{place}/postgres", os.X_OK)
    }
    if not versions:
        raise Failure(
            "no PostgreSQL is installed here: apt install postgresql, or --database with one elsewhere"
        )
    # `9.6` before `15`.
    newest = max(versions, key=float)
    if version and version not in versions:
        raise Failure(
            f"{folder}: its data is of PostgreSQL {version}, and here is {newest}: apt install "
            f"postgresql-{version}; or move {folder}/data away, start again, and `vmapipe fleet rescan` makes "
            "the catalogue anew from the archives"
        )
    return versions[version or newest]


def _owner_name() -> str:
    return _unprivileged().pw_name if os.geteuid() == 0 else "that runs this"


def _unprivileged() -> pwd.struct_passwd:
    for name in _USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Failure("no user postgres or nobody here that PostgreSQL could run as")
