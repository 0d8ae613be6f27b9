# SPDX-License-Identifier: Apache-2.0
"""The archiver as a service and backups that use it: real processes over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.archiver.service.serving import Served, make_keys, serving
from tests.machine import (
    LIMIT_S,
    bad,
    children,
    end_of,
    good,
    make_disk,
    next_event,
    sha256,
    started,
    without_limit,
)

SHAPE = "AA0hp" * 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SHAPE, tail_bytes=5632)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where all processes put their sockets, and nothing else; a short path, for their sake."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def served(tmp_path: Path, temporary: Path) -> Iterator[Served]:
    with serving(tmp_path / "store") as service:
        yield service


def same_disk(archive: Path, name: str, disk: Path, folder: Path) -> None:
    good("verify", "--require-manifest", archive)
    good("restore", archive, folder)
    assert sha256(folder / f"disk-{name}.raw") == sha256(disk)


def all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=LIMIT_S)
    assert alive == []


@contextlib.contextmanager
def slow_backup(served: Served, disk: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A backup of two disks that runs for hours, unless it is told otherwise."""
    with started(
        *("backup", "--json", "--speed", "1K", *served.words),
        *("--disk", f"a={disk}", "--disk", f"b={disk}", name),
    ) as process:
        next_event(process, "begun")
        yield process


def test_a_backup_at_a_service_is_what_a_backup_here_is(
    served: Served, disk: Path, tmp_path: Path, temporary: Path
) -> None:
    config = tmp_path / "vm.conf"
    config.write_text("name: test\n")
    words = ("--disk", f"a={disk}", "--config", f"x=y={config}", "--compress", "zstd:1")
    lines = good("backup", "--json", *served.words, *words, "vm.vma.zst").splitlines()
    events = [json.loads(line) for line in lines]
    assert {"listening", "begun", "sent", "stored", "done"} <= {event["event"] for event in events}
    last = [event for event in events if event["event"] == "progress"][-1]
    assert last["devices"][0]["done_bytes"] == disk.stat().st_size
    (stored,) = [event for event in events if event["event"] == "stored"]
    assert stored["archive"] == f"{served.endpoint}/vm.vma.zst"
    assert served.stored() == {"vm.vma.zst", "vm.vma.zst.manifest.json"}
    same_disk(served.folder / "vm.vma.zst", "a", disk, tmp_path / "out")
    assert (tmp_path / "out" / "x=y").read_text() == "name: test\n"
    log = served.stop()
    assert [e["event"] for e in log if e["event"] != "notice"] == ["job-opened", "job-stored"]
    assert list(temporary.iterdir()) == []


def test_configs_alone_and_no_manifest(served: Served, tmp_path: Path) -> None:
    config = tmp_path / "vm.conf"
    config.write_text("name: test\n")
    good("backup", "--quiet", *served.words, "--config", config, "--no-manifest", "-")
    assert served.stored() == {"-"}


@pytest.mark.parametrize(
    "count", [4, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_many_jobs_at_once_are_stored_each_and_memory_is_bounded(
    served: Served, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    disks = [make_disk(tmp_path / f"{n}.raw", "A0A" * 150, seed=n) for n in range(count)]
    with contextlib.ExitStack() as stack:
        backups = [
            stack.enter_context(
                started("backup", "--quiet", *served.words, "--disk", f"a={disk}", f"{n}.vma")
            )
            for n, disk in enumerate(disks)
        ]
        for backup in backups:
            _, stderr = backup.communicate(timeout=500)
            assert (backup.returncode, stderr) == (0, b"")
    front_bytes = served.rss_peak_bytes()
    log = served.stop()
    peaks = [event["peak_rss_bytes"] for event in log if event["event"] == "job-stored"]
    with capsys.disabled():
        print(f"\n{count} jobs: service {front_bytes >> 20} MiB, ", end="")
        print(f"archivers {min(peaks) >> 20} to {max(peaks) >> 20} MiB")
    assert len(peaks) == count
    assert max(peaks) < 128 << 20
    assert front_bytes < (64 << 20) + count * (16 << 20)
    for n, disk in enumerate(disks):
        same_disk(served.folder / f"{n}.vma", "a", disk, tmp_path / f"out{n}")


@pytest.mark.parametrize("victim", ["archiver", "producer", "remote", "coordinator"])
def test_a_killed_process_fails_its_own_job_and_no_other(
    served: Served, disk: Path, tmp_path: Path, victim: str
) -> None:
    with (
        slow_backup(served, disk, "victim.vma") as backup,
        started(
            "backup", "--json", "--speed", "64K", *served.words, "--disk", f"a={disk}", "x.vma"
        ) as other,
    ):
        next_event(other, "begun")
        family = psutil.Process(backup.pid).children(recursive=True)
        processes = {
            "archiver": [p for p in served.archivers() if "victim.vma" in " ".join(p.cmdline())],
            "producer": children(backup, "vmapipe.producer.main"),
            "remote": children(backup, "vmapipe.control.coordinator.remote_archiver"),
            "coordinator": [psutil.Process(backup.pid)],
        }
        processes[victim][0].kill()
        code, text = end_of(backup)
        all_gone(family)
        told = served.next_event("job-failed")
        without_limit(other)
        assert end_of(other)[0] == 0
    words = {
        "archiver": ("was killed by SIGKILL", "was killed by SIGKILL"),
        "producer": ("the producer of 'a' was killed", ""),
        "remote": ("the archiver was killed by SIGKILL", ""),
        "coordinator": ("", ""),
    }[victim]
    assert code == (-signal.SIGKILL if victim == "coordinator" else 1)
    assert words[0] in text
    assert len(text.splitlines()) <= 1
    assert words[1] in told["text"]
    assert served.stored() == {"x.vma", "x.vma.manifest.json"}
    good("verify", served.folder / "x.vma")
    # Its name is free again.
    good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "victim.vma")


def test_a_killed_service_fails_its_jobs_with_clear_words_and_nothing_is_published(
    tmp_path: Path, disk: Path, temporary: Path
) -> None:
    with (
        # Long enough for a busy machine to begin, short enough to be waited for.
        serving(tmp_path / "store", "--client-timeout", "10") as served,
        slow_backup(served, disk, "vm.vma") as backup,
    ):
        family = psutil.Process(backup.pid).children(recursive=True)
        archivers = served.archivers()
        served.process.kill()
        all_gone(archivers)
        assert served.stored() == set()
        code, text = end_of(backup)
        all_gone(family)
    assert (code, len(text.splitlines())) == (1, 1)
    assert "silent for 10 s" in text
    # The next one finds what was left, and removes it.
    with serving(served.folder) as again:
        good("backup", "--quiet", *again.words, "--disk", f"a={disk}", "vm.vma")
        again.stop()
    assert list(temporary.iterdir()) == []


def test_sigterm_lets_a_job_that_ends_in_time_be_stored(
    tmp_path: Path, temporary: Path, disk: Path
) -> None:
    with (
        serving(tmp_path / "store", "--stop-timeout", "60") as served,
        slow_backup(served, disk, "x.vma") as backup,
    ):
        served.process.send_signal(signal.SIGTERM)
        served.next_event("notice")
        text = bad("backup", *served.words, "--disk", f"a={disk}", "late.vma")
        assert "the service is being stopped [stopping]" in text
        without_limit(backup)
        assert end_of(backup)[0] == 0
        served.process.communicate(timeout=LIMIT_S)
        assert served.process.returncode == 0
    assert served.stored() == {"x.vma", "x.vma.manifest.json"}


@pytest.mark.parametrize(
    ("signum", "timeout"), [(signal.SIGTERM, "0"), (signal.SIGTERM, "1"), (signal.SIGINT, "60")]
)
def test_jobs_that_do_not_end_in_time_fail_when_the_service_is_stopped(
    tmp_path: Path, temporary: Path, disk: Path, signum: signal.Signals, timeout: str
) -> None:
    with (
        serving(tmp_path / "store", "--stop-timeout", timeout) as served,
        slow_backup(served, disk, "x.vma") as backup,
    ):
        log = served.stop(signum)
        code, text = end_of(backup)
    assert code == 1
    assert text.endswith("the service was stopped")
    assert [e["text"] for e in log if e["event"] == "job-failed"] == ["the service was stopped"]
    assert served.stored() == set()
    assert list(temporary.iterdir()) == []


def test_a_cancelled_backup_ends_at_the_service_too(
    served: Served, disk: Path, temporary: Path
) -> None:
    with slow_backup(served, disk, "x.vma") as backup:
        backup.send_signal(signal.SIGINT)
        assert end_of(backup) == (130, "vmapipe backup: cancelled by SIGINT")
    assert served.next_event("job-failed")["text"] == "cancelled by SIGTERM"
    assert served.stored() == set()


def test_what_a_client_asks_for_wrongly_is_refused_in_one_line(
    served: Served, disk: Path, tmp_path: Path
) -> None:
    (served.folder / "taken.vma").write_bytes(b"precious")
    (served.folder / "moved.vma.manifest.json").write_bytes(b"precious")
    (served.folder / "link.vma").symlink_to(tmp_path / "elsewhere")
    words = ("backup", *served.words, "--disk", f"a={disk}")
    for name in ("taken.vma", "moved.vma", "link.vma"):
        assert "[exists]" in bad(*words, name)
    for name in ("../x", "/x", ".x", "x/y", "x.partial", "x.manifest.json", "x" * 201):
        assert "ARCHIVE is a file's name at the service" in bad(*words, name, code=2)
    assert "use zstd" in bad(*words, "--compress", "lzo", "x.vma")
    for more in (["--manifest", "m"], ["--reproducible"], ["--vmid", "100"]):
        bad(*words, *more, "x.vma", code=2)
    assert served.stored() == {"taken.vma", "moved.vma.manifest.json"}
    assert (served.folder / "taken.vma").read_bytes() == b"precious"
    assert not (tmp_path / "elsewhere").exists()
    assert bad("backup", "--keys", "k", "--disk", disk, "x.vma", code=2)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--min-free", "1000000T"), "no-space"),
        (("--min-memory", "1000000T"), "no-memory"),
    ],
)
def test_a_host_that_has_no_room_refuses_new_jobs(
    tmp_path: Path, disk: Path, options: tuple[str, ...], code: str
) -> None:
    with serving(tmp_path / "store", *options) as served:
        text = bad("backup", *served.words, "--disk", f"a={disk}", "x.vma")
        assert f"[{code}]" in text
        assert served.next_event("job-refused")["code"] == code
        served.stop()


def test_a_job_beyond_the_limit_is_refused_and_the_others_go_on(tmp_path: Path, disk: Path) -> None:
    with (
        serving(tmp_path / "store", "--max-jobs", "1") as served,
        slow_backup(served, disk, "1.vma") as first,
    ):
        text = bad("backup", *served.words, "--disk", f"a={disk}", "2.vma")
        assert "1 jobs are running; try later [too-many-jobs]" in text
        assert first.poll() is None


def test_what_a_service_cannot_do_is_said_at_once(tmp_path: Path) -> None:
    words = ("archiver", "--listen", f"ipc://{tmp_path}/s", "--directory")
    assert "no such folder" in bad(*words, tmp_path / "none", code=2)
    assert "--quota needs --per-client" in bad(*words, tmp_path, "--quota", "1G", code=2)
    assert "--per-client needs --keys" in bad(*words, tmp_path, "--per-client", code=2)
    assert "without --output" in bad(*words, tmp_path, "--output", "x", code=2)
    # A coordinator would be given up before its producers.
    text = bad(*words, tmp_path, "--client-timeout=30", "--reconnect-limit=21", code=2)
    assert "two thirds of --client-timeout (30 s)" in text


def test_clients_have_folders_and_quotas_of_their_own(tmp_path: Path, disk: Path) -> None:
    server, clients = make_keys(tmp_path, "alice", "bob")
    (server / "clients" / "bob.toml").write_text('quota = "4M"\njobs = 1\ndirectory = "bobs"\n')
    words = ("--per-client", "--quota", "1G")
    with serving(tmp_path / "store", *words, keys=(server, clients["alice"])) as served:
        of_alice = ("backup", "--quiet", *served.words, "--disk", f"a={disk}")
        of_bob = ("backup", "--archiver", served.endpoint, "--keys", str(clients["bob"]))
        good(*of_alice, "x.vma")
        # A name that the other client has is free here, and says nothing about it.
        big = make_disk(tmp_path / "big.raw", "A" * 400)
        with started(*of_bob, "--json", "--speed", "1K", "--disk", f"a={big}", "x.vma") as slow:
            next_event(slow, "begun")
            assert "[too-many-jobs]" in bad(*of_bob, "--disk", f"a={disk}", "y.vma")
            good("speed", json.loads(good("status"))["job"], "8M")
            code, text = end_of(slow)
        assert (code, "the client's quota of 4194304 bytes is used up" in text) == (1, True)
        assert served.stored() == {"alice/x.vma", "alice/x.vma.manifest.json"}
        small = make_disk(tmp_path / "small.raw", "A" * 65)
        good(*of_bob, "--quiet", "--disk", f"a={small}", "small.vma")
        assert "of a quota of 4194304 [quota]" in bad(*of_bob, "--disk", f"a={small}", "z.vma")
        served.stop()
    assert (tmp_path / "store" / "bobs").stat().st_mode & 0o777 == 0o700
    good("verify", tmp_path / "store" / "alice" / "x.vma")


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LIMIT_S)
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with serving(tmp_path / "store", env=env) as served:
            assert systemd.recv(4096) == b"READY=1\nSTATUS=0 jobs are running"
            assert b"WATCHDOG=1" in systemd.recv(4096)
            served.process.send_signal(signal.SIGTERM)
            while b"STOPPING=1" not in systemd.recv(4096):
                pass
            served.process.communicate(timeout=LIMIT_S)
            assert served.process.returncode == 0
