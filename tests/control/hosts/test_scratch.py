# SPDX-License-Identifier: Apache-2.0
"""The folder of a domain's scratch files."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from vmapipe.control.hosts.libvirt.scratch import ScratchFolder
from vmapipe.runtime.errors import Failure

UUID = "8649036f-0690-416a-b487-5e40209f7fd6"
MIB = 1 << 20


@pytest.mark.parametrize("removed", ["nothing", "the files", "the folder"])
def test_what_qemu_still_writes_to_counts_although_somebody_has_removed_it(
    tmp_path: Path, removed: str
) -> None:
    with (
        closing(ScratchFolder.make(str(tmp_path), UUID, os.geteuid())) as folder,
        open(folder.file("vda"), "wb", buffering=0) as first,
    ):
        first.write(bytes(MIB))
        assert MIB <= folder.used_bytes() < 2 * MIB
        if removed == "the files":
            os.unlink(folder.file("vda"))
        elif removed == "the folder":
            shutil.rmtree(folder.path)
        first.write(bytes(MIB))
        assert 2 * MIB <= folder.used_bytes() < 3 * MIB


def test_a_folder_that_cannot_be_locked_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Failure, match="cannot make a folder for scratch files: No locks"):
        ScratchFolder.make(str(tmp_path), UUID, os.geteuid())
    assert list(tmp_path.iterdir()) == []
