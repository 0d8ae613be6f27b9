# SPDX-License-Identifier: Apache-2.0
"""A QEMU that lies about places, or is another user's who races us: root's files stay root's.

With the most rights there is the most to lose, so most of this needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import absent
from tests.control.qmp.hostile import DISK, HostileQemu, Refusal, hostile_qemu
from tests.machine import good, run
from vmapipe.control.qemu.leftovers import remove_leftovers
from vmapipe.control.qemu.sink_folder import SinkFolder, sink_name
from vmapipe.control.qmp.client import QmpClient
from vmapipe.runtime.errors import Failure

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, too")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may enter, short enough for sockets; `t` in it is TMPDIR."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="v") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "t").mkdir()
        (folder / "t").chmod(0o1777)
        monkeypatch.setenv("TMPDIR", str(folder / "t"))
        yield folder


def node_at(address: str | Path) -> list[dict[str, Any]]:
    """What QEMU says of a node of a crashed backup, whose sink was there."""
    return [
        {
            "node-name": "vmapipe-cafe-0",
            "drv": "nbd",
            "file": f"nbd+unix:///disk?socket={address}",
            "image": {"virtual-size": 65536},
        }
    ]


def a_file(place: Path) -> Path:
    (place / "precious").write_text("precious")
    return place / "precious"


def a_link(place: Path) -> Path:
    (place / "link").symlink_to(a_file(place))
    return place / "link"


def a_socket(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place / "daemon.sock"))
    return place / "daemon.sock"


def nothing(place: Path) -> Path:
    return place / "nothing.sock"


def a_file_in_a_folder_named_as_ours(place: Path) -> Path:
    """Of our own name, in our own TMPDIR, and ours: only what it is tells that it is none."""
    folder = place / "t" / "vmapipe-sinks-0a0a0a0a"
    folder.mkdir(0o700)
    (folder / "0.sock").write_text("precious")
    return folder / "0.sock"


def a_socket_in_somebody_elses_folder(place: Path) -> Path:
    folder = place / "t" / "vmapipe-sinks-0a0a0a0a"
    folder.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "0.sock"))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o777)
    return folder / "0.sock"


def a_socket_behind_a_link_to_a_folder(place: Path) -> Path:
    real = place / "real"
    real.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(real / "0.sock"))
    (place / "t" / "vmapipe-sinks-0a0a0a0a").symlink_to(real)
    return place / "t" / "vmapipe-sinks-0a0a0a0a" / "0.sock"


def a_way_up(place: Path) -> Path:
    a_file(place).rename(place / "0.sock")
    (place / "t" / "vmapipe-sinks-0a0a0a0a").mkdir(0o700)
    return place / "t" / "vmapipe-sinks-0a0a0a0a" / ".." / ".." / "0.sock"


def a_place_of_our_shape_elsewhere(place: Path) -> Path:
    """Where no backup has made a folder, and TMPDIR is not."""
    return place / "vmapipe-sinks-0a0a0a0a" / "0.sock"


def everything(place: Path) -> dict[str, tuple[int, int, int]]:
    """Each name, with what it is."""
    found = {}
    for path in [place, *place.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_uid)
    return found


@pytest.mark.parametrize("command", ["cleanup", "backup"])
@pytest.mark.parametrize(
    "victim",
    [
        a_file,
        a_link,
        a_socket,
        nothing,
        a_file_in_a_folder_named_as_ours,
        a_socket_in_somebody_elses_folder,
        a_socket_behind_a_link_to_a_folder,
        a_way_up,
        a_place_of_our_shape_elsewhere,
    ],
    ids=lambda victim: str(victim.__name__),
)
def test_what_qemu_says_of_a_socket_is_neither_removed_nor_made_where_no_backup_of_ours_was(
    place: Path, tmp_path: Path, command: str, victim: Callable[[Path], Path]
) -> None:
    odd = {"query-named-block-nodes": node_at(victim(place))}
    before = everything(place)
    words = [tmp_path / "vm.vma"] if command == "backup" else []
    with hostile_qemu(tmp_path / "q", odd):
        done = run(command, "--qmp", tmp_path / "q", *words)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert everything(place) == before


def test_what_a_crashed_backup_of_ours_left_is_served_and_removed(
    place: Path, tmp_path: Path
) -> None:
    folder = SinkFolder.make()
    folder.listen("0.sock").close()
    folder.close()
    address = os.path.join(folder.path, "0.sock")
    assert os.path.exists(address)
    nodes = node_at(address)

    def deleted(*words: Any) -> dict[str, Any]:
        nodes.clear()
        return {}

    odd = {"query-named-block-nodes": lambda *words: nodes, "blockdev-del": deleted}
    with hostile_qemu(tmp_path / "q", odd):
        assert good("cleanup", "--qmp", tmp_path / "q") == b"removed vmapipe-cafe-0\n"
    assert list((place / "t").iterdir()) == []


@needs_root
def test_a_sink_that_is_made_again_is_given_to_qemus_user(place: Path, tmp_path: Path) -> None:
    """Its folder has been cleaned away since the crash."""
    address = place / "t" / "vmapipe-sinks-0a0a0a0a" / "0.sock"
    nodes = node_at(address)
    seen: list[tuple[int, int, int]] = []

    def deleted(*words: Any) -> dict[str, Any]:
        folder = address.parent.stat()
        seen.append((address.stat().st_uid, folder.st_uid, stat.S_IMODE(folder.st_mode)))
        nodes.clear()
        return {}

    odd = {"query-named-block-nodes": lambda *words: nodes, "blockdev-del": deleted}
    with hostile_qemu(tmp_path / "q", odd):
        os.chown(tmp_path / "q", NOBODY, NOBODY)
        good("cleanup", "--qmp", tmp_path / "q")
    assert seen == [(NOBODY, 0, 0o711)]
    assert list((place / "t").iterdir()) == []


@needs_root
def test_a_pipe_that_qemu_calls_the_memorys_is_not_read_in_its_readers_place(
    place: Path, tmp_path: Path
) -> None:
    folder = place / "vmapipe-sinks-0a0a0a0a"
    folder.mkdir()
    fifo = folder / "memory.fifo"
    os.mkfifo(fifo)
    os.chown(fifo, NOBODY, -1)
    fd = os.open(fifo, os.O_RDWR)
    os.write(fd, b"for somebody else")
    note = {
        "folder": str(folder),
        "is_live": True,
        "resume": "",
        "capabilities": [],
        "bandwidth_bytes_s": 1,
    }
    notes = [{"name": "vmapipe-cafe-memory", "type": "child<authz-simple>"}]

    def deleted(*words: Any) -> dict[str, Any]:
        notes.clear()
        return {}

    odd = {
        "qom-list": lambda *words: notes,
        "qom-get": json.dumps(note),
        "object-del": deleted,
        **{name: {} for name in ("closefd", "migrate-set-capabilities", "migrate-set-parameters")},
    }
    with hostile_qemu(tmp_path / "q", odd):
        assert good("cleanup", "--qmp", tmp_path / "q") == b"removed vmapipe-cafe-memory\n"
    assert os.read(fd, 99) == b"for somebody else"
    os.close(fd)
    assert stat.S_ISFIFO(fifo.lstat().st_mode)


@needs_root
def test_sockets_are_given_away_while_nobody_else_can_enter_and_no_link_is_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = a_file(place)
    folder = SinkFolder.make()
    for index in range(3):
        folder.listen(f"{index}.sock").close()
    modes = []
    chown = os.chown

    def watched(path: str, uid: int, gid: int, **more: Any) -> None:
        modes.append(stat.S_IMODE(os.stat(folder.path).st_mode))
        # Whoever could enter would do this.
        (Path(folder.path) / path).unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError, IsADirectoryError):
            (Path(folder.path) / path).symlink_to(victim)
        chown(path, uid, gid, **more)

    monkeypatch.setattr(os, "chown", watched)
    with contextlib.suppress(OSError):
        folder.give_to(NOBODY)
    monkeypatch.undo()
    assert modes
    assert set(modes) == {0o700}
    assert victim.stat().st_uid == 0
    status = os.stat(folder.path)
    assert status.st_uid == 0
    folder.close()


RACER = """
import os, sys
folder, victim, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
link = os.path.join(folder, ".link")
print("ready", flush=True)
while True:
    for name in os.listdir(folder):
        for n in range(count):
            path = os.path.join(folder, name, f"{n}.sock")
            try:
                if not os.path.islink(link):
                    os.symlink(victim, link)
                os.rename(link, path)
            except OSError:
                pass
"""


@contextlib.contextmanager
def racing(folder: Path, victim: Path, count: int) -> Iterator[None]:
    """Another user puts links to `victim` in the place of whatever is in folders of sinks."""
    # The system's Python: our own may lie where nobody else may look.
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        absent("a python3 that everybody may run")
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", python, "-c"]
    arguments = [RACER, str(folder), str(victim), str(count)]
    with subprocess.Popen([*words, *arguments], stdout=subprocess.PIPE) as racer:
        try:
            assert racer.stdout is not None
            assert racer.stdout.readline() == b"ready\n"
            yield
        finally:
            racer.kill()


@needs_root
@pytest.mark.parametrize("disks", [1, 12])
def test_a_neighbour_that_races_for_roots_sockets_gets_none_of_roots_files(
    place: Path, disks: int
) -> None:
    """Its own QEMU says how many disks there are: the more, the more time it has."""
    victim = place / "shadow"
    victim.write_text("root only")
    victim.chmod(0o600)
    disk: dict[str, Any] = DISK
    blocks = [
        {
            **disk,
            "device": f"drive{n}",
            "qdev": f"/machine/peripheral/scsi{n}/virtio-backend",
            "inserted": {**disk["inserted"], "node-name": f"n{n}"},
        }
        for n in range(disks)
    ]
    odd = {"query-block": blocks, "blockdev-add": Refusal("no")}
    with hostile_qemu(place / "q", odd), racing(place / "t", victim, disks):
        os.chown(place / "q", NOBODY, NOBODY)
        for _ in range(2):
            done = run("backup", "--qmp", place / "q", place / "vm.vma")
            assert done.returncode == 1
            assert b"QEMU refuses the backup" in done.stderr
    status = victim.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)
    assert [path.name for path in (place / "t").iterdir() if path.name != ".link"] == []


def test_only_the_shape_of_a_sinks_path_is_taken_for_one() -> None:
    assert sink_name("/tmp/vmapipe-sinks-ab_9cd1x/17.sock") == (
        "/tmp/vmapipe-sinks-ab_9cd1x",
        "17.sock",
    )
    for path in (
        "vmapipe-sinks-aaaaaaaa/0.sock",
        "/tmp/vmapipe-sinks-aaaaaaa/0.sock",
        "/tmp/vmapipe-sinks-aaaaaaaa/0.sock/",
        "/tmp/vmapipe-sinks-aaaaaaaa/00.sock",
        "/tmp/vmapipe-sinks-aaaaaaaa/x.sock",
        "/tmp/vmapipe-sinks-aaaaaaaa/../0.sock",
        "/tmp/vmapipe-sinks-aaaaaaaa\n/0.sock",
        "",
    ):
        assert sink_name(path) is None


def test_who_is_told_another_shape_says_the_way_out(place: Path, tmp_path: Path) -> None:
    with hostile_qemu(tmp_path / "q", {"query-named-block-nodes": node_at("/x\x1b/y")}) as qemu:
        link = QmpClient(str(qemu.path))
        with pytest.raises(Failure, match="nothing was touched") as caught:
            remove_leftovers(link)
        link.close()
    assert "'/x\\x1b/y'" in str(caught.value)
    assert isinstance(qemu, HostileQemu)
