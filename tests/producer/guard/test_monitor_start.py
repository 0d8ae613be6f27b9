# SPDX-License-Identifier: Apache-2.0
"""`vmapipe monitor` at its start: whom it refuses, what a crash has left, and command lines that are wrong."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.machine import LIMIT_S, bad, good, make_disk
from tests.producer.guard.serving import serving


def test_an_image_that_another_program_writes_to_is_not_served(tmp_path: Path, need: Any) -> None:
    need("qemu-img")
    image = make_disk(tmp_path / "d.raw", "A")
    words = ["monitor", "--listen", str(tmp_path / "m.sock"), "--disk", f"d={image}"]
    words += ["--export", f"d={tmp_path / 'other.sock'}"]
    with serving(tmp_path, d=image):
        text = bad(*words)
        assert f"disk 'd': {image} is in use by another program" in text
        # QEMU's own tools see our lock, too.
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", str(image)],
            capture_output=True,
            timeout=LIMIT_S,
        )
        assert b"lock" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "no disk to serve"),
        (("--disk", "d=IMAGE"), "disk 'd' has no --export d=SOCKET"),
        (("--disk", "d=IMAGE", "--export", "x=S"), "--export x=S: no --disk has this name"),
        (("--disk", "d=IMAGE", "--disk", "d=IMAGE"), "two disks are called 'd'"),
        (("--disk", "d=IMAGE", "--disk", "e=IMAGE"), "is served twice"),
        (
            ("--disk", "vmstate=IMAGE", "--export", "vmstate=S"),
            "the name 'vmstate' is the memory's",
        ),
        (
            ("--disk", "d=IMAGE", "--export", "d=tcp://0.0.0.0:10809"),
            "whoever reaches it can read and write the disk",
        ),
        (("--disk", "d=IMAGE", "--export", "d=tcp://nowhere"), "is not a valid tcp://HOST:PORT"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(
    tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    image = make_disk(tmp_path / "d.raw", "A")
    given = [word.replace("IMAGE", str(image)) for word in words]
    said = bad("monitor", "--listen", tmp_path / "m.sock", *given, code=2)
    assert text in said


def test_a_socket_that_a_crash_left_is_taken_over_and_any_other_file_is_not(
    tmp_path: Path,
) -> None:
    image = make_disk(tmp_path / "d.raw", "A")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "d.sock"))
    with serving(tmp_path, d=image) as served:
        good("backup", "--monitor", served.monitor, tmp_path / "vm.vma")
        in_use = bad(
            *("monitor", "--listen", tmp_path / "m2.sock", "--disk", f"x={tmp_path / 'vm.vma'}"),
            *("--export", f"x={served.socket('d')}"),
        )
        assert "another process does" in in_use
    assert not (tmp_path / "d.sock").exists()
    (tmp_path / "d.sock").write_text("not a socket")
    words = bad(
        *("monitor", "--listen", tmp_path / "m.sock", "--disk", f"d={image}"),
        *("--export", f"d={tmp_path / 'd.sock'}"),
    )
    assert "it exists, and is not a socket" in words


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--reproducible",), "--reproducible is for disks at rest"),
        (("--spool-size", "65G"), "'65G' is more than 64G"),
        (("--buffer", "7M"), "'7M' is not between 8M and 192M"),
    ],
)
def test_options_that_a_disk_in_use_cannot_have_are_refused(
    tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    monitor = tmp_path / "nobody.sock"
    assert text in bad("backup", "--monitor", monitor, *words, tmp_path / "vm.vma", code=2)


def test_an_exports_socket_is_not_taken_for_the_monitors(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "d.raw", "A")
    with serving(tmp_path, d=image) as served:
        words = bad("backup", "--monitor", served.socket("d"), tmp_path / "vm.vma")
    assert "is an export's socket; --monitor wants the monitor's own (--listen)" in words


def test_a_backup_without_a_monitor_says_so(tmp_path: Path) -> None:
    words = bad("backup", "--monitor", tmp_path / "nobody.sock", tmp_path / "vm.vma")
    assert f"cannot ask the monitor at {tmp_path / 'nobody.sock'}" in words
    assert "is it running?" in words
