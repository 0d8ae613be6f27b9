# SPDX-License-Identifier: Apache-2.0
"""A connection to libvirt's daemon: its errors in words, and an end to every wait.

The one file that imports libvirt's library. Every call goes through `Host.call`: a daemon that
hangs (stopped, its storage dead) never holds the caller for longer than the call's time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as LateError
from importlib.machinery import PathFinder
from typing import Any, TypeVar

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import MAX_NAME_CHARS, name_text, one_line
from vmapipe.runtime.threads import DaemonPool

Result = TypeVar("Result")

#: Debian's python3-libvirt, which a virtual environment does not see.
_DISTRIBUTION = "/usr/lib/python3/dist-packages"
#: Libvirt itself waits 30 s for a machine that another of its commands is busy with.
CALL_S = 45.0
_OPEN_S = 15.0
#: systemd starts a daemon again within seconds, and then it reads all its domains.
DAEMON_S = 60.0
_RETRY_S = 0.5
# A daemon that answers nothing for 15 s is given up by the library: each call then ends.
_KEEPALIVE_S, _KEEPALIVE_TRIES = 5, 3
# Its event loop is woken so often, so that it sees what was added meanwhile.
_LOOP_MS = 1000
# Calls that hang keep a thread each: as many may before new ones have to wait for them.
_THREADS = 4
_WORDS_CHARS = 600
# What the library says of a call during which its connection was lost.
_LOST = "End of file while reading data"


class LibvirtFailure(Failure):
    """An error that libvirt has answered with; `code` is one of its VIR_ERR_ numbers, 0: no answer."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Library:
    """The module `libvirt`, loaded once a process, quiet, and with its event loop running."""

    _module: Any = None
    _lock = threading.Lock()

    @classmethod
    def get(cls) -> Any:
        """Return the module. Raises Failure where it is not installed."""
        with cls._lock:
            if cls._module is None:
                module = _load()
                _prepare(module)
                cls._module = module
        return cls._module

    @classmethod
    def monitor(cls) -> Any:
        """Return the module `libvirt_qemu`. Raises Failure."""
        cls.get()
        return _load("libvirt_qemu")

    @staticmethod
    def find() -> None:
        """Load the module, and nothing more. Raises Failure where it is not installed."""
        _load()


#: Each module of the library, and the part of it that is written in C.
_MODULES = {"libvirt": "libvirtmod", "libvirt_qemu": "libvirtmod_qemu"}


def _load(name: str = "libvirt") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = str(error)
    # In a virtual environment the distribution's own serves as well, if it is for this Python.
    try:
        for part in (_MODULES[name], name):
            spec = PathFinder.find_spec(part, [_DISTRIBUTION])
            if spec is None or spec.loader is None:
                raise ImportError(reason)
            sys.modules[part] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[part])
        return sys.modules[name]
    except (ImportError, OSError) as error:
        sys.modules.pop(name, None)
        sys.modules.pop(_MODULES[name], None)
        reason = str(error)
    raise Failure(
        f"libvirt's library for Python cannot be loaded ({one_line(reason, _WORDS_CHARS)}): "
        "`apt install python3-libvirt`, or `pip install 'vmapipe[libvirt]'`"
    )


def _prepare(module: Any) -> None:
    # It prints every error to stderr otherwise.
    module.registerErrorHandler(lambda context, error: None, None)
    module.virEventRegisterDefaultImpl()
    # A loop that nothing wakes would not see handles that come later.
    module.virEventAddTimeout(_LOOP_MS, lambda timer, opaque: None, None)

    def loop() -> None:
        while module.virEventRunDefaultImpl() == 0:
            pass

    threading.Thread(target=loop, name="libvirt-events", daemon=True).start()


class Host:
    """An open connection; use `closing`, or call `close`. Every method but that raises LibvirtFailure."""

    def __init__(self, uri: str = "", *, read_only: bool = False) -> None:
        """Connect to `uri`; empty: LIBVIRT_DEFAULT_URI, or what libvirt chooses. Raises Failure.

        `read_only`: libvirt itself then refuses all that would change something.
        """
        self.lib = Library.get()
        self._pool = DaemonPool(_THREADS, "libvirt")
        self.uri = uri
        opens = self.lib.openReadOnly if read_only else self.lib.open
        try:
            self.connection: Any = self._wait(
                "opening the connection", _OPEN_S, lambda: opens(uri or None)
            )
        except LibvirtFailure as failure:
            self._pool.close()
            raise LibvirtFailure(
                f"cannot reach libvirt at {shown_uri(uri)}: {failure}{_hint(str(failure))}",
                failure.code,
            ) from failure
        with contextlib.suppress(self.lib.libvirtError):  # an embedded one has none
            self.connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_TRIES)

    def close(self) -> None:
        """Close it, without waiting for a daemon that hangs."""
        with contextlib.suppress(Failure):
            self._wait("closing the connection", 2.0, self.connection.close)
        self._pool.close()

    def call(self, function: Callable[..., Result], *words: Any, limit_s: float = CALL_S) -> Result:
        """Return what `function`, a method of one of libvirt's objects, returns."""
        name = getattr(function, "__name__", "a call")
        return self._wait(name, limit_s, lambda: function(*words))

    def monitor_command(
        self, domain: Any, command: str, fds: Sequence[int] = (), limit_s: float = CALL_S
    ) -> str:
        """Return QEMU's answer to a QMP command, as JSON; the domain is then tainted (custom-monitor)."""
        monitor = Library.monitor()
        if fds:
            files = self._wait(
                "a monitor command",
                limit_s,
                lambda: monitor.qemuMonitorCommandWithFiles(domain, command, list(fds), 0),
            )
            return str(files[0])
        job = lambda: monitor.qemuMonitorCommand(domain, command, 0)  # noqa: E731
        return str(self._wait("a monitor command", limit_s, job))

    def watch_monitor(self, domain: Any, tell: Callable[[str, int, int, str], None]) -> None:
        """Call `tell` for each of QEMU's events: name, seconds, microseconds, details as JSON or empty.

        It is called by a thread of the library's.
        """

        def callback(connection: Any, domain: Any, name: str, *words: Any) -> None:
            seconds, microseconds, details = words[:3]
            tell(name, int(seconds), int(microseconds), details or "")

        register = Library.monitor().qemuMonitorEventRegister
        self._wait(
            "its events",
            CALL_S,
            lambda: register(self.connection, domain, None, callback, None, 0),
        )

    def domain(self, name: str) -> Any:
        """Look up a domain by name, uuid or, of one that runs, its number, as virsh does."""
        lookups: list[Callable[[], Any]] = [
            lambda: self.connection.lookupByName(name),
            lambda: self.connection.lookupByUUIDString(name),
        ]
        if name.isdecimal() and int(name) < 1 << 31:
            lookups.insert(0, lambda: self.connection.lookupByID(int(name)))
        for lookup in lookups:
            try:
                return self._wait("looking up the domain", CALL_S, lookup)
            except LibvirtFailure as failure:
                absent = (self.lib.VIR_ERR_NO_DOMAIN, self.lib.VIR_ERR_INVALID_ARG)
                if failure.code not in absent:
                    raise
        known = self.call(self.connection.listAllDomains)
        names = (
            ", ".join(sorted(name_text(domain.name()) for domain in known[:20])) or "none at all"
        )
        raise LibvirtFailure(
            f"libvirt at {shown_uri(self.uri)} has no domain {name_text(name)}; it has {names}",
            self.lib.VIR_ERR_NO_DOMAIN,
        )

    @property
    def is_alive(self) -> bool:
        """Tell whether the connection still stands."""
        try:
            return bool(self._wait("isAlive", 2.0, self.connection.isAlive))
        except LibvirtFailure:
            return False

    def _wait(self, what: str, limit_s: float, job: Callable[[], Result]) -> Result:
        future = self._pool.submit(job)
        try:
            return future.result(limit_s)
        except self.lib.libvirtError as error:
            raise LibvirtFailure(words_of(error), error.get_error_code() or 0) from error
        except LateError as error:
            raise LibvirtFailure(
                f"libvirt has not answered {what} within {limit_s:.0f} s: is its daemon stopped, or "
                "the machine's QEMU or storage stuck?"
            ) from error


def reconnected(uri: str, limit_s: float, cancel: Cancel) -> Host:
    """Connect to a daemon that may be on its way up. Raises LibvirtFailure, Cancelled."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return Host(uri)
        except LibvirtFailure:
            if time.monotonic() > deadline:
                raise
            cancel.check()
            readable([cancel.fd], _RETRY_S)


def words_of(error: Any) -> str:
    """Return an error of libvirt's as one line."""
    text = one_line(str(error.get_error_message() or error), _WORDS_CHARS)
    return f"libvirt's daemon has ended ({text})" if _LOST in text else text


def is_remote(uri: str) -> bool:
    """Tell whether a connection's URI names another host."""
    return bool(urllib.parse.urlsplit(uri).hostname)


def shown_uri(uri: str) -> str:
    """Return a URI for messages."""
    return one_line(uri, MAX_NAME_CHARS) if uri else "its usual address"


def _hint(words: str) -> str:
    """Return the way out that an error of opening has, if it is known."""
    if "No such file" in words or "Connection refused" in words:
        return "; is libvirtd (or virtqemud) running? `systemctl start libvirtd`"
    if "ermission denied" in words or "authentication" in words:
        return "; run this as root, or as a member of the group libvirt"
    return ""
