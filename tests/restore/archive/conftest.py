# SPDX-License-Identifier: Apache-2.0
"""A place for the bytes of an archive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def store(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        # The name says nothing: what counts is the content.
        path = tmp_path / "archive.bin"
        path.write_bytes(data)
        return path

    return write
