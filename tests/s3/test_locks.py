# SPDX-License-Identifier: Apache-2.0
"""`--lock` in a real store with Object Lock: the very credentials that stored an archive cannot remove it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.archives import archive, manifest
from tests.machine import bad, good, make_disk, run
from tests.s3.server import S3Server
from vmapipe.runtime.objectlock import ObjectLock
from vmapipe.runtime.objectstore import StoredObject

BUCKET = "locked"


def keep_archive(folder: Path) -> Path:
    raw = archive({"a": b"data" * 30000})
    path = folder / "vm-2026-01-01.vma"
    path.write_bytes(raw)
    (folder / f"{path.name}.manifest.json").write_bytes(manifest(raw))
    return path


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


def test_a_store_that_passes_over_the_lock_is_told_and_nothing_is_published(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a gateway does that knows the bucket's setting, and not what a request says of one object."""
    kept = keep_archive(tmp_path)
    monkeypatch.setattr(ObjectLock, "fields", lambda lock: {})
    done = run("copy", "--lock=30d", kept, f"{bucket}/unlocked", as_patched=True)
    assert done.returncode == 1
    assert b"did not lock it for as long as was asked" in done.stderr
    shorter = ObjectLock("GOVERNANCE", time.time() + 60).fields()
    monkeypatch.setattr(ObjectLock, "fields", lambda lock: shorter)
    done = run("copy", "--lock=30d", kept, f"{bucket}/shorter", as_patched=True)
    assert b"did not lock it" in done.stderr
    assert "Contents" not in s3.client.list_objects_v2(Bucket=BUCKET, Prefix="unlocked/")
    assert "Contents" not in s3.client.list_objects_v2(Bucket=BUCKET, Prefix="shorter/")


def test_credentials_that_may_not_see_a_lock_store_and_are_told(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep_archive(tmp_path)
    monkeypatch.setattr(StoredObject, "is_locked", lambda store: None)
    words = ("copy", "--lock=1h", "--lock-mode=governance", kept, f"{bucket}/unseen")
    said = good(*words, as_patched=True)
    assert b"whether it is locked cannot be seen" in said
    assert "Contents" in s3.client.list_objects_v2(Bucket=BUCKET, Prefix="unseen/")
