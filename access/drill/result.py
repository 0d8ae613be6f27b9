# SPDX-License-Identifier: Apache-2.0
"""The result of a restore test, kept as `ARCHIVE.drill.json` beside the archive.

Whoever can write beside an archive can put anything there. So the file is read as a stranger's: in
bounds, each field of its type, and only for the archive with its uuid.
"""

from __future__ import annotations

import json
import os
import re
import uuid as uuids
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from vmapipe.access.machine.spec import Omission
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.side_files import open_regular, write_whole

#: Behind the archive's name.
SUFFIX = ".drill.json"
#: The folder of the evidence, behind the archive's name, unless another was asked for.
EVIDENCE_SUFFIX = ".drill"
Verdict = Literal["booted", "not booted", "undecided"]
StepState = Literal["answered", "silent", "wrong"]

_VERSION = 1
# Some hundred omissions with a sentence each; no result of ours is longer.
_MAX_BYTES = 256 << 10
_MAX_ITEMS = 500
_MAX_CHARS = 4000
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


class StepResult(NamedTuple):
    """What one step of the plan has come to; `seconds`: when it answered, None: it never did."""

    kind: str
    state: StepState
    seconds: float | None
    detail: str


class DrillResult(NamedTuple):
    """`seconds`: to the proof, None: there is none; `evidence`: the folder's name, empty: none kept."""

    archive_uuid: str
    date: str
    verdict: Verdict
    reason: str
    seconds: float | None
    proof: str
    steps: tuple[StepResult, ...]
    left_out: tuple[Omission, ...]
    accelerator: str
    firmware: str
    is_resumed: bool
    bytes_read: int
    evidence: str


def encode_result(result: DrillResult) -> bytes:
    """Return the file's content."""
    fields: dict[str, Any] = {"vmapipe_drill": _VERSION, **result._asdict()}
    fields["steps"] = [step._asdict() for step in result.steps]
    fields["left_out"] = [omission._asdict() for omission in result.left_out]
    return json.dumps(fields, indent=1).encode() + b"\n"


def decode_result(raw: bytes) -> DrillResult:
    """Raises ValueError, with what is wrong, for what no drill has written."""
    if len(raw) > _MAX_BYTES:
        raise ValueError("it is too long")
    try:
        fields = json.loads(raw)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(fields, dict) or fields.get("vmapipe_drill") != _VERSION:
        raise ValueError("it is not a result of a drill, or of another version")
    date = _text(fields, "date")
    if not _DATE.fullmatch(date):
        raise ValueError("date is not a time")
    identity = _text(fields, "archive_uuid")
    if str(uuids.UUID(identity)) != identity:
        raise ValueError("archive_uuid is not a uuid")
    verdict = _text(fields, "verdict")
    if verdict not in get_args(Verdict):
        raise ValueError("verdict is none of ours")
    seconds = _seconds(fields)
    if (verdict == "booted") != (seconds is not None):
        raise ValueError("seconds and verdict do not fit")
    evidence = _text(fields, "evidence")
    if evidence != os.path.basename(evidence) or evidence in (".", ".."):
        raise ValueError("evidence is not a name")
    bytes_read, is_resumed = fields.get("bytes_read"), fields.get("is_resumed")
    if type(bytes_read) is not int or not 0 <= bytes_read < 1 << 63:
        raise ValueError("bytes_read is not a size")
    if not isinstance(is_resumed, bool):
        raise ValueError("is_resumed is not true or false")
    return DrillResult(
        identity,
        date,
        verdict,  # type: ignore[arg-type]  # looked up above
        _text(fields, "reason"),
        seconds,
        _text(fields, "proof"),
        tuple(_step(item) for item in _items(fields, "steps")),
        tuple(
            Omission(_text(item, "key"), _text(item, "reason"))
            for item in _items(fields, "left_out")
        ),
        _text(fields, "accelerator"),
        _text(fields, "firmware"),
        is_resumed,
        bytes_read,
        evidence,
    )


def _step(item: Mapping[str, Any]) -> StepResult:
    state = _text(item, "state")
    if state not in get_args(StepState):
        raise ValueError("a step's state is none of ours")
    return StepResult(
        _text(item, "kind"),
        state,  # type: ignore[arg-type]  # looked up above
        _seconds(item),
        _text(item, "detail"),
    )


def _text(fields: Mapping[str, Any], key: str) -> str:
    """Return a text for people: printable, of one line, and not endless."""
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > _MAX_CHARS or not value.isprintable():
        raise ValueError(f"{key} is not a text of one line")
    return value


def _seconds(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("seconds")
    if value is None:
        return None
    # NaN is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError("seconds is not a time")
    return float(value)


def _items(fields: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = fields.get(key)
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise ValueError(f"{key} is not a list of ours")
    if not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key} holds what is no object")
    return value


def write_result(archive: str, result: DrillResult) -> None:
    """Write it beside the archive, all of it or nothing. Raises Failure."""
    path = archive + SUFFIX
    try:
        write_whole(path, encode_result(result), 0o600)
    except OSError as error:
        raise Failure(
            f"cannot write the result of the test, {path}: {os_error_text(error)}"
        ) from error


def read_result(archive: str, uuid: bytes) -> DrillResult | None:
    """Return the latest result for the archive at this path with this uuid; None: there is none.

    None also for a file that is another archive's, or not valid.
    """
    try:
        fd = open_regular(archive + SUFFIX)
        with open(fd, "rb") as file:
            result = decode_result(file.read(_MAX_BYTES + 1))
    except (OSError, ValueError):
        return None
    return result if uuids.UUID(result.archive_uuid).bytes == uuid else None
