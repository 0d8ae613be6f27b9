# SPDX-License-Identifier: Apache-2.0
"""Libvirt's own schema of a domain."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

import pytest

from tests.access.machine.domains import SCHEMA
from tests.conftest import absent
from tests.machine import LIMIT_S, Need


@pytest.fixture(scope="session")
def validates(
    need: Need, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str]], None]:
    """Whether libvirt's own schema takes all of these."""
    (xmllint,) = need("xmllint")
    if not SCHEMA.exists():
        absent("libvirt's schemas (Debian: libvirt0)")

    def check(texts: Sequence[str]) -> None:
        if not texts:
            return
        folder = tmp_path_factory.mktemp("xml")
        paths = [folder / f"{index}.xml" for index in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        words = [xmllint, "--noout", "--relaxng", str(SCHEMA), *map(str, paths)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-3000:]

    return check
