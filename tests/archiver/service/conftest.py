# SPDX-License-Identifier: Apache-2.0
"""A service with small limits, whose archivers and clients are simulated."""

from __future__ import annotations

import pytest

from tests.archiver.service.world import BOUNDS, World


@pytest.fixture
def world() -> World:
    return World(BOUNDS)
