# SPDX-License-Identifier: Apache-2.0
"""What `vmapipe doctor` says of a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.machine import run


def examined(*words: str | Path, code: int = 0) -> dict[str, Any]:
    done = run("doctor", "--json", *words)
    assert done.returncode == code, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ready"] is not bool(code)
    return found


def topics(found: dict[str, Any], verdict: str) -> list[str]:
    return [f["topic"] for f in found["findings"] if f["verdict"] == verdict]
