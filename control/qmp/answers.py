# SPDX-License-Identifier: Apache-2.0
"""The shapes of the answers and events that we read: checked once, when they come. Pure.

Code that reads an answer relies on these: a listed member has its type wherever it is, and a `needed`
one is there. What is not listed may be anything, so list a member before you read it. The error for an
answer that does not fit names the place and what is wrong there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

# Ids, names, states. A node's name has 31 characters at most, a device's id what its user likes;
# QEMU's longest path in its object tree around it has some 60 more.
_NAME_CHARS = 1024
_MOST = (1 << 63) - 1


class Shape(Protocol):
    """The shape that a value must have."""

    def fault(self, value: object) -> str:
        """Return where a value does not fit and why, as `.member is …`; empty: it fits."""


class Text(NamedTuple):
    """A string; QEMU's are C's, and have no NUL."""

    most_chars: int = 1 << 20

    def fault(self, value: object) -> str:
        if not isinstance(value, str):
            return " is not a string"
        if "\0" in value:
            return " has a NUL character"
        return f" has more than {self.most_chars:,} characters" * (len(value) > self.most_chars)


class Whole(NamedTuple):
    """An integer of 63 bits; JSON's booleans are none."""

    least: int = 0

    def fault(self, value: object) -> str:
        if not isinstance(value, int) or isinstance(value, bool):
            return " is not a whole number"
        fits = self.least <= value <= _MOST
        return "" if fits else f" is {value}, which is not from {self.least} to 2^63 - 1"


class Number(NamedTuple):
    """Any number within 63 bits."""

    def fault(self, value: object) -> str:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return " is not a number"
        return "" if abs(value) <= _MOST else " is beyond 63 bits"


class Flag(NamedTuple):
    """True or false."""

    def fault(self, value: object) -> str:
        return "" if isinstance(value, bool) else " is not true or false"


class Maybe(NamedTuple):
    """A value of this shape, or null."""

    shape: Shape

    def fault(self, value: object) -> str:
        return "" if value is None else self.shape.fault(value)


class List(NamedTuple):
    """A list of any length."""

    item: Shape

    def fault(self, value: object) -> str:
        if not isinstance(value, list):
            return " is not a list"
        for number, item in enumerate(value):
            if fault := self.item.fault(item):
                return f"[{number}]{fault}"
        return ""


class Filled(NamedTuple):
    """A list that is not empty."""

    shape: List

    def fault(self, value: object) -> str:
        return self.shape.fault(value) or ("" if value else " is empty")


class Record(NamedTuple):
    """An object with these members, and any others."""

    needed: Mapping[str, Shape] = {}
    more: Mapping[str, Shape] = {}

    def fault(self, value: object) -> str:
        if not isinstance(value, dict):
            return " is not an object"
        for name in self.needed:
            if name not in value:
                return f" has no member {name!r}"
        for members in (self.needed, self.more):
            for name, shape in members.items():
                if name in value and (fault := shape.fault(value[name])):
                    return f".{name}{fault}"
        return ""


#: Members by their names.
Members = Mapping[str, Shape]
NAME, TEXT, SIZE, FLAG, NUMBER = Text(_NAME_CHARS), Text(), Whole(), Flag(), Number()

_IMAGE: Members = {
    "virtual-size": SIZE,
    "filename": TEXT,
    "format": NAME,
    "backing-image": Record(),
    "backing-filename": TEXT,
}
_NODE: Members = {
    "node-name": NAME,
    "ro": FLAG,
    "drv": NAME,
    "file": TEXT,
    "image": Record({}, _IMAGE),
    "backing_file": TEXT,
    "backing_file_depth": SIZE,
    "children": List(Record({"node-name": NAME}, {"child": NAME})),
}
_BLOCK = Record(
    {"device": NAME},
    {"qdev": NAME, "removable": FLAG, "io-status": NAME, "inserted": Record({}, _NODE)},
)
_BLOCK_JOB: Members = {
    **dict.fromkeys(("device", "type", "io-status"), NAME),
    **dict.fromkeys(("len", "offset", "speed"), SIZE),
}
_GRAPH = Record(
    {
        "nodes": List(Record({"id": SIZE, "type": NAME, "name": NAME})),
        "edges": List(Record({"parent": SIZE, "child": SIZE, "name": NAME})),
    }
)
_HISTOGRAM = Record({"boundaries": List(SIZE), "bins": List(SIZE)})
_COUNTED = ("rd", "wr", "flush", "unmap", "zone_append")
_BLOCK_STATS: Members = {
    "device": NAME,
    "qdev": NAME,
    "stats": Record(
        {},
        {
            "idle_time_ns": SIZE,
            **{f"{kind}_latency_histogram": _HISTOGRAM for kind in _COUNTED},
            **{f"{kind}_operations": SIZE for kind in _COUNTED},
            **{f"{kind}_total_time_ns": SIZE for kind in _COUNTED},
        },
    ),
}
_RAM: Members = dict.fromkeys(("transferred", "total", "normal", "duplicate"), SIZE)
_DISK_COUNTS = (
    *("bytes", "done_bytes", "zero_bytes", "read_bytes", "sent_bytes", "saved_bytes"),
    *("memory_bytes", "spool_bytes", "waiting_writes"),
)
_JOB_NUMBERS = (
    *("started", "seconds", "total_bytes", "done_bytes", "zero_bytes", "stored_bytes"),
    *("plain_bytes", "speed_bytes_s", "rate_bytes_s", "read_rate_bytes_s"),
)
_LATENCY = Record(
    {
        **dict.fromkeys(("bound_s", "p99_s", "worst_s", "limit_bytes_s"), NUMBER),
        **dict.fromkeys(("last_p99_s", "last_read_bytes_s"), Filled(List(NUMBER))),
    }
)
_PROCESS: Members = {"name": TEXT, "pid": SIZE, "age_s": NUMBER, "cpu_s": NUMBER, "rss_bytes": SIZE}

#: By command.
ANSWERS: Members = {
    # QEMU's.
    "query-blockstats": List(Record({}, _BLOCK_STATS)),
    "query-iothreads": List(Record()),
    "query-block": List(_BLOCK),
    "query-named-block-nodes": List(Record({}, _NODE)),
    "query-block-jobs": List(Record({}, _BLOCK_JOB)),
    "query-jobs": List(
        Record(
            {"id": NAME, "status": NAME},
            {"type": NAME, "error": TEXT, "current-progress": SIZE, "total-progress": SIZE},
        )
    ),
    "query-uuid": Record({}, {"UUID": NAME}),
    "query-version": Record({}, {"qemu": Record(dict.fromkeys(("major", "minor", "micro"), SIZE))}),
    "query-qmp-schema": List(
        Record({}, {"name": NAME, "arg-type": NAME, "members": List(Record())})
    ),
    "query-chardev": List(Record({"label": NAME}, {"frontend-open": FLAG})),
    "query-tpm": List(Record({"id": NAME}, {"options": Record({}, {"type": NAME})})),
    "add-fd": Record({"fdset-id": SIZE}),
    "x-debug-query-block-graph": _GRAPH,
    "query-status": Record({"status": NAME}, {"running": FLAG}),
    "query-memory-size-summary": Record({}, {"base-memory": SIZE, "plugged-memory": SIZE}),
    "query-migrate": Record({}, {"status": NAME, "error-desc": TEXT, "ram": Record({}, _RAM)}),
    "query-migrate-capabilities": List(Record({"capability": NAME, "state": FLAG})),
    "query-migrate-parameters": Record({}, {"max-bandwidth": SIZE}),
    # Of the objects that are notes of ours, and devices' error policies; nothing else is asked for.
    "qom-get": TEXT,
    "qom-list": List(Record({}, {"name": NAME, "type": NAME})),
    # A monitor's of ours.
    "query-disks": List(Record({"name": NAME, "size": SIZE, "guard": TEXT})),
    # A running backup's.
    "query-job": Record(
        {
            "job": NAME,
            "uuid": NAME,
            "archive": TEXT,
            "status": NAME,
            "errmsg": TEXT,
            **dict.fromkeys(_JOB_NUMBERS, NUMBER),
            "left_s": Maybe(NUMBER),
            "devices": List(
                Record(
                    {"name": TEXT, **dict.fromkeys(_DISK_COUNTS, SIZE)},
                    {"unchanged_bytes": SIZE, "full_reason": Maybe(TEXT)},
                )
            ),
            "processes": List(Record(_PROCESS)),
        },
        # A backup that was started before an update tells nothing of a base, nor of its guest.
        {"base": TEXT, "base_bytes": SIZE, "shared_bytes": SIZE, "guest_latency": Maybe(_LATENCY)},
    ),
}

_JOB = Record({}, {"device": NAME, "error": TEXT, "id": NAME, "status": NAME, "operation": NAME})
_EVENT_DATA: Members = {
    **dict.fromkeys(("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR"), _JOB),
    **dict.fromkeys(("BLOCK_JOB_PENDING", "BLOCK_JOB_READY", "JOB_STATUS_CHANGE"), _JOB),
    "SHUTDOWN": Record({}, {"reason": NAME}),
    "MIGRATION": Record({"status": NAME}),
}
# QEMU says -1 where the host has no time.
_STAMP = Record({"seconds": Whole(-1), "microseconds": Whole(-1)})
_EVENT = Record({"event": Text(128)}, {"data": Record(), "timestamp": _STAMP})


def answer_fault(command: str, answer: object) -> str:
    """Return why an answer is not valid; empty: it is, or its shape is not listed."""
    shape = ANSWERS.get(command)
    return _worded(shape.fault(answer)) if shape else ""


def event_fault(event: Mapping[str, object]) -> str:
    if fault := _EVENT.fault(event):
        return _worded(fault)
    shape = _EVENT_DATA.get(str(event["event"]))
    fault = shape.fault(event.get("data", {})) if shape else ""
    return f"data{fault}" if fault else ""


def _worded(fault: str) -> str:
    """Word a fault: `it` is the whole answer; a member is named without the leading dot."""
    return f"it{fault}" if fault.startswith(" ") else fault.removeprefix(".")
