# SPDX-License-Identifier: Apache-2.0
"""`vmapipe copy` into a real store and out of it; what an earlier try has brought is not sent again."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.archives import archive, manifest
from tests.conftest import CopyHere
from tests.machine import good
from tests.s3.server import S3Server
from vmapipe.archiver.outputs.object import ObjectOutput
from vmapipe.runtime.errors import Failure

RAW = archive({"a": random.Random(1).randbytes(40 * 65536)}, {"c": b"1"})
NAME = "vm-2026-01-01.vma"
# The least that a store takes for a part.
PART = 5 << 20


def test_there_and_back_an_archive_is_the_same_with_all_that_belongs_to_it(
    s3: S3Server, tmp_path: Path, out: Path, copy_here: CopyHere
) -> None:
    (tmp_path / NAME).write_bytes(RAW)
    (tmp_path / f"{NAME}.manifest.json").write_bytes(manifest(RAW))
    (tmp_path / f"{NAME}.notes").write_bytes(b"note")
    good("copy", "--quiet", tmp_path / NAME, "s3://backups/vms")
    assert sorted(s3.objects()) == [f"vms/{NAME}{e}" for e in ("", ".manifest.json", ".notes")]
    assert s3.data(f"vms/{NAME}") == RAW
    assert "1 were there" in copy_here(tmp_path, "s3://backups/vms")
    copy_here("--quiet", "s3://backups/vms", "s3://backups/other")
    copy_here("--quiet", "--move", "s3://backups/other", out)
    assert [key for key in s3.objects() if key.startswith("other")] == []
    assert {path.name for path in out.iterdir()} == {
        f"{NAME}{e}" for e in ("", ".manifest.json", ".notes")
    }
    assert (out / NAME).read_bytes() == RAW
    s3.put(f"vms/{NAME}", RAW[:-1] + b"!")
    os.unlink(out / NAME)
    copy_here("s3://backups/vms", out, code=4)
    assert not (out / NAME).exists()


def test_parts_that_an_earlier_upload_has_brought_are_not_sent_again(s3: S3Server) -> None:
    data = random.Random(3).randbytes(3 * PART + 100)
    name = "s3://backups/vm.vma"
    first = ObjectOutput(name, first_part_bytes=PART, resume="word")
    first.write([data[: 2 * PART + 10]])
    first.prepare()
    first.abandon()
    assert s3.uploads() == ["vm.vma"]
    second = ObjectOutput(name, first_part_bytes=PART, resume="word")
    second.write([data])
    second.commit()
    assert second.kept_bytes == 2 * PART
    assert s3.data("vm.vma") == data
    assert s3.uploads() == []


def test_an_upload_of_other_bytes_is_not_gone_on_with_and_one_that_is_spoilt_is_aborted(
    s3: S3Server,
) -> None:
    name = "s3://backups/vm.vma"
    first = ObjectOutput(name, first_part_bytes=PART, resume="word")
    first.write([random.Random(4).randbytes(2 * PART)])
    first.prepare()
    first.abandon()
    data = random.Random(5).randbytes(2 * PART)
    second = ObjectOutput(name, first_part_bytes=PART, resume="word")
    second.write([data])
    second.prepare()
    assert second.kept_bytes == 0
    second.spoil()
    second.abandon()
    # The other one may be somebody's who is at it just now.
    assert s3.uploads() == ["vm.vma"]
    with pytest.raises(Failure):
        second.write([data])


@pytest.mark.parametrize("size_bytes", [100, PART + 100])
def test_an_upload_of_somebody_else_under_the_same_name_is_left_alone(
    size_bytes: int, s3: S3Server
) -> None:
    upload = s3.begin_upload("vm.vma")
    theirs = random.Random(6).randbytes(PART)
    s3.client.upload_part(
        Bucket="backups", Key="vm.vma", UploadId=upload, PartNumber=1, Body=theirs
    )
    data = random.Random(7).randbytes(size_bytes)
    ours = ObjectOutput("s3://backups/vm.vma", first_part_bytes=PART, resume="word")
    ours.write([data])
    ours.commit()
    assert s3.data("vm.vma") == data
    (part,) = s3.client.list_parts(Bucket="backups", Key="vm.vma", UploadId=upload)["Parts"]
    assert part["ETag"].strip('"') == hashlib.md5(theirs, usedforsecurity=False).hexdigest()
