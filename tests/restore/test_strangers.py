# SPDX-License-Identifier: Apache-2.0
"""Archives that another program wrote, in every way that the format allows, come back whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.restore.support import a_cancel, contents, one_frame, restored_to
from tests.strangers import ARCHIVES, archive_of
from tests.vma.archives import read_whole
from vmapipe.restore.verify.verify import verify


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_a_stranger_wrote_is_listed_verified_and_restored(tmp_path: Path, name: str) -> None:
    raw, files = archive_of(name)
    plain = tmp_path / "vm.vma"
    plain.write_bytes(raw)
    _, disks, configs = ARCHIVES[name]
    head = read_whole(raw)
    assert [device.name for device in head.devices] == [d for _, d, _ in sorted(disks)]
    assert [(config.name, config.data) for config in head.configs] == configs
    with a_cancel() as cancel:
        assert verify(str(plain), lambda event: None, cancel).ok
    restored_to(plain, tmp_path / "plain")
    assert contents(tmp_path / "plain") == files
    # One way that cannot seek beside the one that can: they alternate.
    packed = tmp_path / "packed"
    packed.write_bytes(one_frame(raw) if len(name) % 2 else gzip.compress(raw, 1))
    restored_to(f"exec:cat {packed}", tmp_path / "piped")
    assert contents(tmp_path / "piped") == files
