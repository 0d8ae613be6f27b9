# SPDX-License-Identifier: Apache-2.0
"""The QEMUs that the live tests use: the installed one, and what scripts/newer-qemus has fetched."""

from __future__ import annotations

import os
from pathlib import Path

INSTALLED = "installed"
#: By the release of Debian that each is of: 13, and the one to come.
FETCHED = ("trixie", "sid")


def programs_of(suite: str) -> Path:
    """The folder of a fetched QEMU's programs, which may be absent."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vmapipe" / "qemu" / suite / "bin"
