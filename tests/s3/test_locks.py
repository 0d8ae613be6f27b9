# SPDX-License-Identifier: Apache-2.0
"""`--lock` in a real store with Object Lock: the very credentials that stored an archive cannot remove it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.machine import bad, good, make_disk
from tests.s3.server import S3Server

BUCKET = "locked"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    s3_server.client.create_bucket(Bucket=BUCKET, ObjectLockEnabledForBucket=True)
    return f"s3://{BUCKET}"


def test_the_store_refuses_the_credentials_that_stored_a_locked_archive(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A0p")
    name = "vm-2026-01-01.vma"
    good("backup", "--quiet", "--disk", f"d={disk}", "--lock=30d", f"{bucket}/{name}")
    for key in (name, f"{name}.manifest.json"):
        found = s3.client.head_object(Bucket=BUCKET, Key=key)
        assert found["ObjectLockMode"] == "COMPLIANCE"
        assert found["ObjectLockRetainUntilDate"].timestamp() - time.time() > 29 * 86400
        for more in ({}, {"BypassGovernanceRetention": True}):
            with pytest.raises(ClientError) as refused:
                s3.client.delete_object(
                    Bucket=BUCKET, Key=key, VersionId=found["VersionId"], **more
                )
            assert refused.value.response["Error"]["Code"] == "AccessDenied"
    good("backup", "--quiet", "--disk", f"d={disk}", f"{bucket}/vm-2026-01-02.vma")
    said = good("prune", "--keep-last=1", "--yes", bucket).decode().splitlines()
    assert said[1].startswith("keep (locked until 20")
    listed = [json.loads(line) for line in good("list", "--json", bucket).splitlines()]
    assert [bool(each["locked_until"]) for each in listed] == [True, False]
    good("verify", "--require-manifest", "--quiet", f"{bucket}/{name}")
    good(
        "copy",
        "--quiet",
        "--lock=1h",
        "--lock-mode=governance",
        f"{bucket}/{name}",
        f"{bucket}/copies",
    )
    found = s3.client.head_object(Bucket=BUCKET, Key=f"copies/{name}")
    assert found["ObjectLockMode"] == "GOVERNANCE"


def test_a_bucket_without_object_lock_refuses_before_the_backup_begins(
    s3: S3Server, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A0p")
    text = bad("backup", "--disk", f"d={disk}", "--lock=30d", "s3://backups/vm.vma")
    assert "its bucket has no Object Lock" in text
    assert (s3.objects(), s3.uploads()) == ({}, [])
