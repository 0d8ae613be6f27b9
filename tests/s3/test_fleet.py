# SPDX-License-Identifier: Apache-2.0
"""A round of a fleet whose target is a bucket, and whose copies are in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from tests.machine import good
from tests.s3.server import BUCKET, S3Server
from vmapipe.fleet.records import ArchiveRecord
from vmapipe.fleet.sqlite_file import open_file

MIB = 1 << 20
OLD = "web-2026_01_01-00_00_00.vma.zst"


def test_a_round_into_a_bucket_is_copied_verified_and_pruned_and_all_of_it_is_known(
    s3: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "copies").mkdir()
    (tmp_path / "web.raw").write_bytes(os.urandom(MIB) + bytes(MIB))
    (tmp_path / "fleet.toml").write_text(
        '[defaults]\ntarget = "cloud"\nkeep = { last = 1 }\nverify_every = "7d"\n'
        f'[host.a]\nguests = ["disks:{tmp_path}/*.raw"]\n'
        f'[target.cloud]\ns3 = "s3://{BUCKET}/vm"\n'
        f'[target.near]\ndirectory = "{tmp_path}/copies"\ncopy_from = "cloud"\n'
    )

    def fleet(*words: str) -> str:
        options = ("--file", tmp_path / "fleet.toml", "--catalogue", tmp_path / "fleet.db")
        return good("fleet", *words, *options).decode()

    def known() -> dict[tuple[str, str], ArchiveRecord]:
        catalogue = open_file(f"{tmp_path}/fleet.db")
        found = catalogue.select(ArchiveRecord)
        catalogue.close()
        return {(one.target, one.archive): one for one in found}

    # What a lost catalogue has left: it is due, and what prune removes then.
    s3.put(f"vm/{OLD}", b"old")
    fleet("rescan")
    assert known()["cloud", OLD].location == f"s3://{BUCKET}/vm/{OLD}"
    # The old one is copied while the new one is made, which is copied in the same round.
    assert "0 failed, 0 wait" in fleet("run")
    there = {key: one for key, one in known().items() if not one.removed_s}
    name = next(archive for target, archive in there if target == "near")
    assert set(there) == {("cloud", name), ("near", name)}
    assert known()["cloud", OLD].removed_s
    archive, copy = there["cloud", name], there["near", name]
    objects = s3.objects()
    assert set(objects) == {f"vm/{name}", f"vm/{name}.manifest.json"}
    assert archive.size_bytes == objects[f"vm/{name}"] == Path(copy.location).stat().st_size
    assert (copy.copy_of, archive.disk_bytes) == ("cloud", 2 * MIB)
    assert fleet("check").startswith("FLEET OK - 1 machines, all as promised")
    assert name in fleet("history", "web")
    # The catalogue is lost: bucket and folder say the same once more.
    (tmp_path / "fleet.db").unlink()
    assert "2 archives in 2 targets" in fleet("rescan")
    assert set(known()) == set(there)
    assert '"why": "not-due"' in fleet("plan", "--json")
