# SPDX-License-Identifier: Apache-2.0
"""The simulated node of these tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.hosts.pve.simulated import SimulatedNode


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    """Below a short path: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="pve-") as folder:
        yield SimulatedNode(Path(folder))
