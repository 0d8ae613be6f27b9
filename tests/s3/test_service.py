# SPDX-License-Identifier: Apache-2.0
"""A service whose archives go to an object store: real processes, a real store."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.archiver.service.serving import Served, make_keys, serving
from tests.machine import (
    bad,
    children,
    end_of,
    eventually,
    good,
    make_disk,
    next_event,
    sha256,
    started,
)
from tests.s3.proxy import FaultyProxy
from tests.s3.server import BUCKET, S3Server
from vmapipe.archiver.outputs import object as object_module
from vmapipe.archiver.service.storage import ClientLimits, ClientRules, ObjectStorage

STORE = f"s3://{BUCKET}/hosts"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where services have their folders: systemd's name for it. Its path is short."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder))
    return folder


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than a part."""
    return make_disk(tmp_path_factory.mktemp("disks") / "a.raw", "A" * 400 + "0hp", 5632)


@contextlib.contextmanager
def stuck_job(
    served: Served, s3: S3Server, proxy: FaultyProxy, disk: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The first part does not arrive: an upload is under way, and the backup cannot end."""
    stuck = proxy.plan("PUT .*partNumber=1", "stall")
    with started("backup", "--json", *served.words, "--disk", f"a={disk}", "x.vma") as backup:
        next_event(backup, "begun")
        assert stuck.fired.wait(60)
        assert s3.uploads() == ["hosts/x.vma"]
        yield backup
        # It would wait for the last words of a service that a test has killed.
        if backup.poll() is None:
            for process in children(backup, "vmapipe.control.coordinator.remote_archiver"):
                process.kill()


def test_backups_of_other_hosts_go_into_a_store_and_nothing_there_is_replaced(
    s3: S3Server, disk: Path, tmp_path: Path, temporary: Path
) -> None:
    server, clients = make_keys(tmp_path, "alice", "bob")
    (server / "clients" / "bob.toml").write_text('quota = "4M"\ndirectory = "bobs"\n')
    s3.put("hosts/alice/moved.vma.manifest.json", b"precious")
    keys = (server, clients["alice"])
    with serving(tmp_path / "none", "--per-client", keys=keys, store=STORE) as served:
        backup = ("backup", *served.words, "--disk", f"a={disk}")
        good(*backup, "--quiet", "x.vma")
        before = s3.objects()
        assert set(before) == {
            "hosts/alice/x.vma",
            "hosts/alice/x.vma.manifest.json",
            "hosts/alice/moved.vma.manifest.json",
        }
        # The service has the name as that of a job until the first job's process has ended.
        there = f"{STORE}/alice/x.vma exists; vmapipe does not overwrite"
        assert eventually(lambda: there in bad(*backup, "x.vma"))
        assert "moved.vma.manifest.json exists; vmapipe" in bad(*backup, "moved.vma")
        of_bob = ("backup", "--archiver", served.endpoint, "--keys", str(clients["bob"]))
        text = bad(*of_bob, "--disk", f"a={disk}", "x.vma")
        assert "a quota is not counted in an object store" in text
        assert s3.objects() == before
        assert s3.uploads() == []
        served.stop()
    good("verify", "--quiet", "--require-manifest", f"{STORE}/alice/x.vma")
    good("restore", "--quiet", f"{STORE}/alice/x.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-a.raw") == sha256(disk)
    assert list(temporary.iterdir()) == []


def test_the_upload_of_a_killed_archiver_is_aborted_by_its_service(
    s3: S3Server, proxy: FaultyProxy, disk: Path, tmp_path: Path
) -> None:
    with (
        serving(tmp_path / "none", store=STORE) as served,
        stuck_job(served, s3, proxy, disk) as backup,
    ):
        (archiver,) = served.archivers()
        archiver.kill()
        assert end_of(backup)[0] == 1
        assert "SIGKILL" in served.next_event("job-failed")["text"]
        assert eventually(lambda: s3.uploads() == [])
        served.stop()
    assert s3.objects() == {}


@pytest.mark.slow
def test_a_killed_service_leaves_no_upload_because_its_archivers_end_with_it(
    s3: S3Server, proxy: FaultyProxy, disk: Path, tmp_path: Path
) -> None:
    with (
        serving(tmp_path / "none", store=STORE) as served,
        stuck_job(served, s3, proxy, disk),
    ):
        served.process.kill()
    assert eventually(lambda: s3.uploads() == [])
    assert s3.objects() == {}


def test_the_next_service_aborts_what_one_left_that_was_killed_with_its_archivers(
    s3: S3Server, proxy: FaultyProxy, disk: Path, tmp_path: Path, temporary: Path
) -> None:
    with (
        serving(tmp_path / "none", store=STORE) as served,
        stuck_job(served, s3, proxy, disk),
    ):
        everybody = [psutil.Process(served.process.pid), *served.archivers()]
        for process in everybody:
            process.suspend()
        for process in everybody:
            process.kill()
    assert s3.uploads() == ["hosts/x.vma"]
    # One that goes elsewhere cannot abort it, and leaves the note to one that can.
    with serving(tmp_path / "folder") as other:
        other.stop()
    words = ("--listen", "tcp://127.0.0.1:*", "--directory", STORE, "--insecure-plain-tcp")
    with started("archiver", *words, "--json") as second:
        told = next_event(second, "notice")["text"]
        assert told == f"an upload of {STORE}/x.vma that a killed service left behind was aborted"
        next_event(second, "ready")
        assert s3.uploads() == []
        second.terminate()
        assert end_of(second)[0] == 0
    assert list(temporary.iterdir()) == []


def test_old_uploads_are_aborted_in_all_folders_below_the_prefix_and_nowhere_else(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_module, "STALE_S", -60.0)  # the store's clock need not be ours
    for key in ("hosts/a.vma", "hosts/alice/b.vma.zst", "other/c.vma", "hosts/alice/photo.jpg"):
        s3.begin_upload(key)
    said: list[str] = []
    places = ObjectStorage(STORE, ClientRules(ClientLimits(), None, per_client=True))
    places.check([], said.append)
    assert sorted(s3.uploads()) == ["hosts/alice/photo.jpg", "other/c.vma"]
    assert len(said) == 2


def test_what_a_service_cannot_do_in_a_store_is_refused_when_it_is_started(
    s3: S3Server, tmp_path: Path
) -> None:
    server, _ = make_keys(tmp_path, "alice")
    words = ("archiver", "--listen", "tcp://127.0.0.1:*", "--keys", server, "--per-client")
    for more, text in (
        (("--quota", "1G", "--output", STORE), "--quota: an object store is not counted"),
        (("--min-free", "1G", "--output", STORE), "--min-free: an object store does not say"),
        (("--output", "s3://"), "names no bucket"),
        (("--output", f"s3://{BUCKET}/a/../b"), "are refused"),
        (("--directory", STORE, "--output", STORE), "without --output"),
    ):
        assert text in bad(*words, *more, code=2)
    assert "cannot use the bucket of s3://no-bucket-here/" in bad(
        *words, "--output", "s3://no-bucket-here/x"
    )
    denied = {**os.environ, "AWS_SECRET_ACCESS_KEY": "another"}
    assert "cannot use the bucket of" in bad(*words, "--output", STORE, env=denied)
