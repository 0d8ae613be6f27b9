# SPDX-License-Identifier: Apache-2.0
"""The result of a restore test, kept as `ARCHIVE.drill.json` beside the archive; evidence and metrics of it.

Whoever can write beside an archive can put anything there. So the file is read as a stranger's: in
bounds, each field of its type, and only for the archive with its uuid. The evidence is a folder of
bounded files, named by this program only; the metrics are a text file for Prometheus' node_exporter.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid as uuids
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from vmapipe.access.drill.screen import MAX_PNG_BYTES, is_png
from vmapipe.access.machine.spec import Omission
from vmapipe.control.coordinator.metrics import SUFFIX as METRICS_SUFFIX
from vmapipe.control.coordinator.metrics import escaped_label, old_value
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.side_files import DRILL_SUFFIX, open_regular, write_whole

#: The folder of the evidence, behind the archive's name, unless another was asked for.
EVIDENCE_SUFFIX = ".drill"
Verdict = Literal["booted", "not booted", "undecided"]
StepState = Literal["answered", "silent", "wrong"]

_VERSION = 1
# Some hundred omissions with a sentence each; no result of ours is longer.
MAX_RESULT_BYTES = 256 << 10
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
    if len(raw) > MAX_RESULT_BYTES:
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
    path = archive + DRILL_SUFFIX
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
        fd = open_regular(archive + DRILL_SUFFIX)
        with open(fd, "rb") as file:
            result = decode_result(file.read(MAX_RESULT_BYTES + 1))
    except (OSError, ValueError):
        return None
    return result if uuids.UUID(result.archive_uuid).bytes == uuid else None


#: The picture in the folder of the evidence.
PICTURE = "screen.png"
#: Every file that there may be in it: the picture, logs and the result.
EVIDENCE_NAMES = (
    PICTURE,
    "screen.txt",
    "serial.log",
    "firmware.log",
    "qemu.log",
    "result.json",
)
# A picture of a full screen has some 100 KiB, a log at most 1 MiB.
_MAX_EVIDENCE_BYTES = 8 << 20


def keep_evidence(path: str, files: Mapping[str, bytes]) -> None:
    """Write the files into the folder `path`, in place of an earlier test's. Raises Failure."""
    place, name = os.path.split(os.path.abspath(path))
    try:
        with HeldFolder(place) as above, _folder(above, name) as folder:
            for file_name in EVIDENCE_NAMES:
                _unlink(folder, file_name)
            for file_name, data in files.items():
                if file_name in EVIDENCE_NAMES and len(data) <= _MAX_EVIDENCE_BYTES:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                    with open(folder.open(file_name, flags), "wb") as file:
                        file.write(data)
    except OSError as error:
        raise Failure(f"cannot keep the evidence in {path}: {os_error_text(error)}") from error


def read_picture(path: str, archive: str) -> bytes | None:
    """Return the screen of an archive's restore test, if it is a picture of ours (`is_png`).

    The path may come from another host: no other file of this one is read, no link followed, nothing waited for.
    """
    place, evidence = os.path.split(os.path.dirname(path))
    own = (os.path.basename(archive) + EVIDENCE_SUFFIX, PICTURE)
    if (evidence, os.path.basename(path)) != own:
        return None
    try:
        with HeldFolder(place) as held, held.folder(evidence) as inside:
            fd = inside.open(PICTURE, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            with open(fd, "rb") as file:
                raw = file.read(MAX_PNG_BYTES + 1)
    except (OSError, ValueError):
        return None
    return raw if is_png(raw) else None


def remove_evidence(above: HeldFolder, name: str) -> None:
    """Remove such a folder; one that holds more than that stays. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), above.folder(name) as folder:
        for file_name in EVIDENCE_NAMES:
            _unlink(folder, file_name)
        if not folder.names():
            above.remove_folder(name, folder)


def _folder(above: HeldFolder, name: str) -> HeldFolder:
    try:
        return above.make_folder(name)
    except FileExistsError:
        # Never through a link: somebody else would choose where it leads.
        folder = above.folder(name)
    if os.fstat(folder.fd).st_uid != os.geteuid():
        folder.close()
        raise PermissionError(0, "the folder belongs to another user")
    return folder


def _unlink(folder: HeldFolder, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder.fd)


_LAST_SUCCESS = "vmapipe_drill_last_success_timestamp_seconds"


def render_metrics(name: str, result: DrillResult, last_success: float, ended_s: float) -> str:
    """`name` tells this file's metrics from those of others. `last_success` 0: never."""
    has_booted = result.verdict == "booted"
    values = {
        "vmapipe_drill_success": ("Whether the last archive that was tested boots.", has_booted),
        "vmapipe_drill_last_run_timestamp_seconds": ("When the last test ended.", ended_s),
        _LAST_SUCCESS: ("When an archive was last proved to boot.", last_success),
        "vmapipe_drill_boot_seconds": ("How long it took to boot.", result.seconds),
        "vmapipe_drill_read_bytes": ("How much the guest has read.", result.bytes_read),
    }
    if has_booted:
        values[_LAST_SUCCESS] = (values[_LAST_SUCCESS][0], ended_s)
    lines = []
    for metric, (text, value) in values.items():
        if value is not None and (value or metric != _LAST_SUCCESS):
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge"]
            label = f'{{drill="{escaped_label(name)}"}}'
            lines.append(f"{metric}{label} {round(float(value), 3):.15g}")
    return "\n".join(lines) + "\n"


def write_metrics(path: str, result: DrillResult) -> None:
    """All of it or nothing: the exporter may read at any moment. Raises Failure."""
    place, name = os.path.split(path)
    try:
        with HeldFolder(place) as folder:
            before = old_value(folder, name, _LAST_SUCCESS)
        text = render_metrics(name.removesuffix(METRICS_SUFFIX), result, before, time.time())
        write_whole(path, text.encode(), 0o644)  # the exporter is another user
    except OSError as error:
        raise Failure(f"cannot write the metrics {path}: {os_error_text(error)}") from error
