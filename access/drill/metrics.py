# SPDX-License-Identifier: Apache-2.0
"""The verdict of the last restore test, as a text file for Prometheus' node_exporter."""

from __future__ import annotations

import os
import time

from vmapipe.access.drill.result import DrillResult
from vmapipe.control.coordinator.metrics import SUFFIX, escaped_label, old_value
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.side_files import write_whole

_LAST_SUCCESS = "vmapipe_drill_last_success_timestamp_seconds"


def render(name: str, result: DrillResult, last_success: float, ended_s: float) -> str:
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


def write(path: str, result: DrillResult) -> None:
    """All of it or nothing: the exporter may read at any moment. Raises Failure."""
    place, name = os.path.split(path)
    try:
        with HeldFolder(place) as folder:
            before = old_value(folder, name, _LAST_SUCCESS)
        text = render(name.removesuffix(SUFFIX), result, before, time.time())
        write_whole(path, text.encode(), 0o644)  # the exporter is another user
    except OSError as error:
        raise Failure(f"cannot write the metrics {path}: {os_error_text(error)}") from error
