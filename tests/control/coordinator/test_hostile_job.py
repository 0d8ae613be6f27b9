# SPDX-License-Identifier: Apache-2.0
"""Something else at a running backup's socket: `status`, `cancel` and `speed` end, in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.control.qmp.hostile import Flood, Raw, Silence, hostile_qemu
from tests.machine import run
from vmapipe.control.coordinator.status import JobState

NAME = "a" * 32


def a_job(**changes: Any) -> dict[str, Any]:
    usage = {"name": "the coordinator", "pid": 1, "age_s": 1.5, "cpu_s": 0.5, "rss_bytes": 1 << 20}
    details = JobState("/backup/vm.vma", 1000.0, job=NAME).details(1002.0)
    return {**details, "processes": [usage], **changes}


def say(folder: Path, answer: Any, *words: str, greeting: Any = None) -> tuple[int, str, str]:
    """The exit code and the words of a command while such a one listens."""
    folder.mkdir(mode=0o700)
    odd = {"query-job": answer, "backup-cancel": {}, "backup-set-speed": {}}
    more = {} if greeting is None else {"greeting": greeting}
    with hostile_qemu(folder / f"{NAME}.sock", odd, **more):
        done = run(*words, env=os.environ)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("command", ["status", "cancel", "speed"])
@pytest.mark.parametrize(
    "answer",
    [
        5,
        None,
        [],
        {},
        a_job(archive=5),
        a_job(devices=7),
        a_job(devices=[{"name": "a"}]),
        a_job(processes=[{"pid": "x"}]),
        a_job(started="yesterday"),
        a_job(total_bytes=True),
        Raw(b'{"return":' + b"[" * 100_000 + b"\n"),
        Raw(b'{"return": "' + b"x" * (2 << 20)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_not_a_job_is_one_line(runtime_folder: Path, command: str, answer: Any) -> None:
    words = [command, "5M"] if command == "speed" else [command]
    code, _, said = say(runtime_folder, answer, *words)
    assert "Traceback" not in said
    assert "the answer to query-job is not valid" in said
    assert code == (0 if command == "status" else 1)
    assert len(said.splitlines()) <= 2
    assert len(said) < 1500


@pytest.mark.parametrize(
    "greeting", [Raw(b"junk\n"), Raw(b"\x1b[31m\n"), Raw(b'{"QMP": 5}\n'), Raw(b"[" * 100_000)]
)
def test_what_greets_otherwise_is_one_line(runtime_folder: Path, greeting: Any) -> None:
    code, _, said = say(runtime_folder, a_job(), "status", greeting=greeting)
    assert code == 0
    assert "is it a backup's socket" in said
    assert "\x1b" not in said


@pytest.mark.slow  # a job has ten seconds to answer
@pytest.mark.parametrize("answer", [Flood(b"\r\n" * 10_000), Silence()])
@pytest.mark.parametrize("command", ["status", "cancel"])
def test_a_job_that_never_answers_is_given_up(
    runtime_folder: Path, command: str, answer: Any
) -> None:
    code, _, said = say(runtime_folder, answer, command)
    assert code == (0 if command == "status" else 1)
    assert "the backup has not answered query-job for 10 s" in said


def test_escapes_in_a_jobs_words_do_not_reach_the_terminal(runtime_folder: Path) -> None:
    odd = a_job(archive="\x1b[31mEVIL\n", errmsg="\x1b]0;x\x07")
    code, out, said = say(runtime_folder, odd, "status", "--json")
    assert code == 0
    assert "\x1b" not in out + said
    shutil.rmtree(runtime_folder)
    code, out, said = say(runtime_folder, odd, "cancel", "nothing")
    assert code == 1
    assert "\x1b" not in out + said


def test_an_honest_job_beside_a_hostile_one_is_told(runtime_folder: Path) -> None:
    runtime_folder.mkdir(mode=0o700)
    with (
        hostile_qemu(runtime_folder / f"{NAME}.sock", {"query-job": 5}),
        hostile_qemu(runtime_folder / f"{'b' * 32}.sock", {"query-job": a_job(job="b" * 32)}),
    ):
        done = run("status", "--json")
    assert b'"job": "' + b"b" * 32 in done.stdout
    assert b"is not valid" in done.stderr
