# SPDX-License-Identifier: Apache-2.0
"""The inputs that fuzzing found worth keeping: a file for each target, base64, a line for each."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def read(name: str) -> list[bytes]:
    """Return none for a target that was never fuzzed."""
    if not (FOLDER / f"{name}.txt").exists():
        return []
    lines = (FOLDER / f"{name}.txt").read_text(encoding="ascii").splitlines()
    return [base64.b64decode(line, validate=True) for line in lines]


def write(name: str, inputs: Iterable[bytes]) -> None:
    """Each once, the shortest first."""
    kept = sorted(set(inputs), key=lambda item: (len(item), item))
    lines = [base64.b64encode(item).decode() + "\n" for item in kept if item]
    (FOLDER / f"{name}.txt").write_text("".join(lines), encoding="ascii")
