# SPDX-License-Identifier: Apache-2.0
"""What outsiders call things and say goes through each command; each byte that comes out is looked at.

Nothing may steer a terminal, begin a line of its own, or go on for ever.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.qmp.hostile import DISK, Refusal, hostile_qemu
from tests.machine import VMA, make_disk, run
from vmapipe.runtime.text import MAX_LINE_CHARS

STEERS = "x\x1b]0;pwned\x07\x1b[31m\r\nroot@host:~# \x9b2J\u202e\x7f"
LONG = "very long " * 200
NAMES = [STEERS, LONG.replace(" ", "_")[:1500], "ünïcode", "-rf", "%s{0}", "'\"; $(id)"]


def looked_at(*outputs: bytes) -> None:
    """Fails at a byte that is not for people, and at a line without an end."""
    for output in outputs:
        for line in output.decode().split("\n"):
            assert line.isprintable(), ascii(line)[:300]
            assert len(line) <= MAX_LINE_CHARS + 200


def tried(*words: str | Path, **more: Any) -> int:
    """Run a command; its exit code, when its words are fit to be seen."""
    done = run(*words, **more)
    looked_at(done.stdout or b"", done.stderr or b"")
    assert b"Traceback" not in (done.stderr or b"")
    return done.returncode


@pytest.fixture(params=NAMES, ids=["steers", "long", "unicode", "dash", "format", "shell"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", "AA0")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "conf").write_text("name: web\n")
    return tmp_path / "conf"


def test_names_of_disks_and_configs_through_a_backup_and_all_that_looks_at_it(
    tmp_path: Path, name: str, disk: Path, config: Path
) -> None:
    archive = tmp_path / "vm.vma"
    log, prom = tmp_path / "log", tmp_path / "vm.prom"
    code = tried(
        *("backup", f"--disk={name}={disk}", f"--config={name}={config}"),
        *("--log", log, "--log-level", "debug", "--metrics", prom, archive),
    )
    looked_at(log.read_bytes(), prom.read_bytes())
    if code:
        return  # no archive can have it, and that was said
    for words in (
        ("list", archive),
        ("list", "--json", archive),
        ("config", archive),
        ("config", "--name", f"{name} not", archive),
        ("verify", archive),
        ("restore", archive, tmp_path / "out"),
        ("restore", archive, tmp_path / "out2", "--device", f"{name} not"),
        ("restore", archive, tmp_path / "out3", "--device", f"{name}={name}/x"),
    ):
        tried(*words)
    damaged = bytearray(archive.read_bytes())
    damaged[-70_000] ^= 1
    archive.write_bytes(damaged)
    assert tried("verify", archive) == 4
    for words in (("list", archive), ("verify", archive), ("extract", archive, tmp_path / "o")):
        tried(*words, tool=VMA)
    tried("create", tmp_path / "v", "-v", "-d", f"format=raw:{name}={disk}", tool=VMA)


@pytest.mark.parametrize("name", [STEERS, "-rf", "ü\u202e", "a" * 200])
def test_names_of_archives_and_folders(tmp_path: Path, name: str, disk: Path) -> None:
    folder = tmp_path / f"{name} of folder"
    folder.mkdir()
    archive = folder / f"{name}-2026-01-01.vma"
    assert tried("backup", "--disk", f"d={disk}", archive) == 0
    for words in (
        ("backup", "--disk", f"d={disk}", archive),
        ("list", archive),
        ("verify", archive),
        ("restore", archive, folder / "out"),
        ("list", folder / "none"),
        ("verify", folder),
        ("prune", folder, "--keep-last", "1"),
        ("prune", folder, "--keep-last", "1", f"--only={name} not"),
        ("prune", folder, "--keep-all", "--json"),
        ("cancel", f"x{name}"),
        ("keygen", folder / name),
        ("keygen", folder / name),
        ("cleanup", f"--qmp={folder}/none"),
        ("backup", f"--{name}"),
        (f"x{name}",),
    ):
        assert tried(*words) in (0, 1, 2)


@pytest.mark.parametrize("words", [STEERS, "no" + LONG * 500], ids=["steers", "endless"])
@pytest.mark.parametrize("what", ["device", "refusal", "job"])
def test_what_a_qemu_says(tmp_path: Path, words: str, what: str) -> None:
    disk: dict[str, Any] = DISK
    odds: dict[str, dict[str, Any]] = {
        "device": {"query-block": [{**disk, "device": words, "qdev": words}]},
        "refusal": {"blockdev-add": Refusal(words)},
        "job": {"query-block-jobs": [{"device": "drive0", "type": words}]},
    }
    with hostile_qemu(tmp_path / "q", odds[what]):
        tried("backup", "--qmp", tmp_path / "q", tmp_path / "vm.vma")
        tried("backup", "--json", "--qmp", tmp_path / "q", "--disk", words[:500], tmp_path / "v")
        tried("cleanup", "--qmp", tmp_path / "q")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Path]:
    """A guest agent whose only word is an error of 500,000 letters.

    One that is larger than what is read at most has its test in tests/control/qemu/test_freezing.py.
    """
    error = STEERS * (500_000 // len(STEERS))
    path = tmp_path / "agent"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                try:
                    while data := client.recv(65536):
                        for raw in data.replace(b"\xff", b"").splitlines():
                            asked = json.loads(raw or b"{}")
                            sync = (asked.get("arguments") or {}).get("id")
                            prefix, said = b"\xff", dict[str, Any]({"return": sync})
                            if "sync" not in asked.get("execute", ""):
                                # Only the answer to that has the delimiter before it.
                                prefix, said = b"", {"error": {"class": "X", "desc": error}}
                            client.sendall(prefix + json.dumps(said).encode() + b"\n")
                except (OSError, ValueError):
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


def test_what_a_guests_agent_says(tmp_path: Path, agent: Path) -> None:
    with hostile_qemu(tmp_path / "q", {"blockdev-add": Refusal("no")}):
        done = run("backup", "--qmp", tmp_path / "q", "--agent", agent, tmp_path / "vm.vma")
    looked_at(done.stdout, done.stderr)
    assert done.returncode == 1
    # Its own words, escaped.
    assert b"refuses guest-fsfreeze-thaw" in done.stderr
    assert b"root@host" in done.stderr


def test_what_hooks_and_commands_say(tmp_path: Path, disk: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(
        "#!/bin/sh\nprintf '\\033[31m\\r%s' \"$(head -c 900000 /dev/zero | tr '\\0' x)\"\n"
    )
    hook.chmod(0o755)
    assert tried("backup", "--disk", f"d={disk}", "--hook", hook, tmp_path / "vm.vma") == 0
    words = "exec:printf '\\033[31mno'; printf '\\033]0;x\\007' >&2; exit 3"
    done = run("list", words)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
