# SPDX-License-Identifier: Apache-2.0
"""The trace of `--log-level`: what crosses a process boundary, through the standard `logging`.

`debug` has events, instructions, commands and answers; `trace` also those that come with each
extent, or several times a second. Off, each place costs one comparison, and `logging` is not even
loaded: it takes as long as a twentieth of a start. Values are shortened, and bytes are shown as their
length only, so that neither a guest's data nor a key is ever in the trace.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

#: The level of `logging.DEBUG`, which is not loaded for its number.
DEBUG = 10
#: Below DEBUG: what comes with each extent, or several times a second.
TRACE = 5
TRACE_LEVELS = ("debug", "trace")
#: The levels of vzdump's log, beside those of the trace.
LEVELS = (*TRACE_LEVELS[::-1], "info", "warn", "error")
#: How the level comes to child processes, forked, started anew or through a monitor.
VARIABLE = "VMAPIPE_LOG_LEVEL"
# A line is to be read by a person: more of a list or a text says nothing more.
_MOST_ITEMS = 6
_MOST_CHARS = 200
# Members of commands and events whose values must not be logged.
_SECRET = frozenset({"data", "password", "secret", "key", "keys", "iv"})


class Trace:
    """A module's part of the trace: the logger of that name, loaded when there is something to write."""

    __slots__ = ("_name",)
    #: The least level that is written, for all parts; 0: there is no trace.
    least = 0

    def __init__(self, name: str) -> None:
        self._name = name

    def has(self, level: int) -> bool:
        """Return whether lines of this level are written: look before making what they say."""
        return 0 < Trace.least <= level

    def debug(self, text: str, *values: object) -> None:
        self.log(DEBUG, text, *values)

    def log(self, level: int, text: str, *values: object) -> None:
        """Write a line, its values put in as by `%`, if lines of this level are written."""
        if self.has(level):
            import logging

            logging.getLogger(self._name).log(level, text, *values)


def start_logging() -> None:
    """Write the trace that VARIABLE asks for to stderr; do nothing when it asks for none."""
    level = os.environ.get(VARIABLE)
    if level not in TRACE_LEVELS or Trace.least:
        return
    import logging

    log = logging.getLogger("vmapipe")
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(process)d %(name)s: %(message)s")  # milliseconds, too
    )
    log.addHandler(handler)
    log.propagate = False
    Trace.least = TRACE if level == "trace" else DEBUG
    log.setLevel(Trace.least)
    # A full disk or a closed stderr must not end a backup, nor write tracebacks.
    logging.raiseExceptions = False


def debug(log: Trace, what: str, value: Any) -> None:
    """Log `what` and a value in short at level debug. Not for what comes with each extent."""
    if log.has(DEBUG):
        log.debug("%s %s", what, shown(value))


def shown(value: Any) -> str:
    """Return `value` in short, without any bytes of it."""
    match value:
        case bytes() | bytearray() | memoryview():
            text = f"<{memoryview(value).nbytes} bytes>"
        case dict():
            text = _members("", value)
        case tuple() if hasattr(value, "_asdict"):
            text = _members(type(value).__name__, value._asdict())
        case set():
            text = shown(sorted(value))
        case list() | tuple():
            more = [f"… {len(value)} in all"] if len(value) > _MOST_ITEMS else []
            text = f"[{', '.join([*map(shown, value[:_MOST_ITEMS]), *more])}]"
        case str():
            text = repr(value if len(value) <= _MOST_CHARS else value[:_MOST_CHARS] + "…")
        case None | bool() | int() | float():
            text = str(value)
        case _ if hasattr(value, "__dataclass_fields__"):
            names = list(value.__dataclass_fields__)
            text = _members(type(value).__name__, {name: getattr(value, name) for name in names})
        case _:
            text = type(value).__name__
    return text


def _members(name: str, members: Mapping[str, Any]) -> str:
    told = [f"{key}={'…' if key in _SECRET else shown(v)}" for key, v in members.items()]
    return f"{name}({', '.join(told)})"
