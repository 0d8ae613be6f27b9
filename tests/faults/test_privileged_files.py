# SPDX-License-Identifier: Apache-2.0
"""Every change that root makes in the file system, as the kernel sees it: none by a path of others.

All that a command works with lies below a folder of another user, who could put a link in the
place of any name there between two of our steps. So below it everything has to be named
relative to a descriptor, by a single name, and without following a link of that name.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.archiver.service.serving import make_keys, serving
from tests.control.qmp.hostile import Refusal, hostile_qemu
from tests.machine import LIMIT_S, VMA, VMAPIPE, Need, listens, make_disk

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="for root below somebody else's folder")

_CALL = re.compile(r"^\d+ +(?P<name>\w+)\((?P<words>.*)\) += (?P<result>-?\d+|\?)")
# A descriptor's folder, and a quoted path.
_AT = re.compile(r"(?P<fd>AT_FDCWD|\d+)<(?P<folder>[^>]*)>, \"(?P<path>(?:[^\"\\]|\\.)*)\"")
_PATH = re.compile(r"\"(?P<path>(?:[^\"\\]|\\.)*)\"")
_CHANGING = (
    *("unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2", "link", "linkat"),
    *("symlink", "symlinkat", "mkdir", "mkdirat", "mknod", "mknodat", "chmod", "fchmodat"),
    *("chown", "lchown", "fchownat", "truncate", "setxattr", "utimensat", "bind"),
)
_WRITES = re.compile(r"O_CREAT|O_WRONLY|O_RDWR|O_TRUNC|__O_TMPFILE|O_TMPFILE")
_ONE_NAME = re.compile(r"/proc/self/fd/\d+/[^/]+|/proc/self/fd/\d+")


def wrong_calls(trace: str, theirs: Path) -> list[str]:
    """The lines that change something below `theirs` by a path that its owner can lead elsewhere."""
    wrong = []
    for line in trace.splitlines():
        call = _CALL.match(line)
        if call is None or call["result"] in ("-1", "?"):
            continue
        name, words = call["name"], call["words"]
        opens = name in ("open", "openat", "openat2", "creat")
        if not (name in _CHANGING or (opens and _WRITES.search(words))):
            continue
        if re.search(r"\bO_TMPFILE|__O_TMPFILE", words):
            continue  # it has no name, so nobody finds it wherever it is
        relative = {found["path"]: found["folder"] for found in _AT.finditer(words)}
        for found in _PATH.finditer(words):
            path, folder = found["path"], relative.get(found["path"], "")
            if path.startswith("/"):
                bad = path.startswith(f"{theirs}/") and not _ONE_NAME.fullmatch(path)
            else:
                below = folder == str(theirs) or folder.startswith(f"{theirs}/")
                bad = below and "/" in path
                follows = opens and not re.search(r"O_NOFOLLOW|O_EXCL|O_TMPFILE", words)
                bad = bad or (below and follows)
            if bad:
                wrong.append(line)
    return wrong


class Scene:
    """`theirs`: another user's folder, in which TMPDIR (`t`), runtime folder and targets are."""

    def __init__(self, ours: Path, theirs: Path, strace: str) -> None:
        self.ours = ours
        self.theirs = theirs
        self._strace = strace
        self.calls = 0

    def words(self, *words: str | Path, tool: Sequence[str] = VMAPIPE) -> list[str]:
        trace = self.ours / f"trace-{self.calls}"
        self.calls += 1
        kinds = "trace=%file,bind,setxattr"
        strace = [self._strace, "-f", "-y", "-s", "4096", "-e", kinds, "-o", str(trace)]
        return [*strace, *tool, *map(str, words)]

    def good(self, *words: str | Path, tool: Sequence[str] = VMAPIPE) -> None:
        done = subprocess.run(
            self.words(*words, tool=tool), capture_output=True, timeout=2 * LIMIT_S, cwd=self.ours
        )
        assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()

    def wrong(self) -> list[str]:
        lines = []
        changes = 0
        for trace in self.ours.glob("trace-*"):
            text = trace.read_text(errors="replace")
            changes += len(re.findall(r"O_CREAT|unlink|rename|mkdir|bind", text))
            lines += wrong_calls(text, self.theirs)
        # Else nothing was looked at.
        assert changes > 3
        return lines


@pytest.fixture
def scene(need: Need, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Scene]:
    (strace,) = need("strace")
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as name:
        theirs = Path(name) / "their"
        for folder in (theirs, theirs / "t", theirs / "out"):
            folder.mkdir()
            os.chown(folder, NOBODY, NOBODY)
        monkeypatch.setenv("TMPDIR", str(theirs / "t"))
        monkeypatch.setenv("VMAPIPE_RUNTIME_DIR", str(theirs / "run"))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        yield Scene(tmp_path, theirs, strace)


def test_the_look_itself_sees_what_is_wrong() -> None:
    theirs = Path("/tmp/vx/their")
    good = """\
1  unlinkat(5</tmp/vx/their/out>, "vm.vma.partial", 0) = 0
1  openat(5</tmp/vx/their/out>, "a", O_WRONLY|O_CREAT|O_NOFOLLOW, 0600) = 6</tmp/vx/their/out/a>
1  bind(3<socket:[1]>, {sa_family=AF_UNIX, sun_path="/proc/self/fd/5/0.sock"}, 110) = 0
1  openat(AT_FDCWD</root>, "/tmp/vx/their/out", O_RDONLY|O_DIRECTORY) = 5</tmp/vx/their/out>
1  unlink("/tmp/vx/their/gone") = -1 ENOENT (No such file or directory)
"""
    wrong = """\
1  unlink("/tmp/vx/their/a") = 0
1  openat(AT_FDCWD</root>, "/tmp/vx/their/log", O_WRONLY|O_CREAT|O_APPEND, 0666) = 5</x>
1  openat(5</tmp/vx/their/out>, "a", O_WRONLY|O_CREAT, 0600) = 6</tmp/vx/their/out/a>
1  mkdirat(5</tmp/vx/their>, "out/a", 0700) = 0
1  bind(3<socket:[1]>, {sa_family=AF_UNIX, sun_path="/tmp/vx/their/0.sock"}, 110) = 0
1  chown("/tmp/vx/their/t/0.sock", 65534, -1) = 0
"""
    assert wrong_calls(good, theirs) == []
    assert wrong_calls(wrong, theirs) == wrong.splitlines()


def test_a_backup_at_rest_with_all_that_lies_beside_it(scene: Scene) -> None:
    disk = make_disk(scene.ours / "disk", "AA0")
    out = scene.theirs / "out"
    scene.good(
        *("backup", "--disk", f"d={disk}", "--log", out / "vm.log", "--metrics", out / "vm.prom"),
        out / "vm-2026-01-01.vma",
    )
    scene.good("backup", "--disk", f"d={disk}", "--vmid", "100", "--notes", "mine", out)
    scene.good("backup", "--disk", f"d={disk}", out / "vm-2026-01-02.vma")
    scene.good("verify", out / "vm-2026-01-01.vma")
    scene.good("prune", out, "--only", "vm", "--keep-last", "1", "--yes")
    assert not (out / "vm-2026-01-01.vma").exists()
    assert scene.wrong() == []


def test_a_restore(scene: Scene) -> None:
    disk = make_disk(scene.ours / "disk", "AA0")
    scene.good("backup", "--disk", f"d={disk}", scene.ours / "vm.vma")
    scene.good("restore", scene.ours / "vm.vma", scene.theirs / "out" / "new")
    assert scene.wrong() == []


def test_the_reference_tools_grammar(scene: Scene) -> None:
    disk = make_disk(scene.ours / "disk", "AA0")
    out = scene.theirs / "out"
    scene.good("create", out / "vm.vma", "-d", f"format=raw:d={disk}", tool=VMA)
    scene.good("extract", out / "vm.vma", out / "new", tool=VMA)
    assert (out / "new" / "disk-d.raw").read_bytes() == disk.read_bytes()
    assert scene.wrong() == []


def test_an_archive_that_is_served(scene: Scene) -> None:
    """With its socket, what clients write, its index and its cache in another user's folders."""
    disk, out = make_disk(scene.ours / "disk", "AA0"), scene.theirs / "out"
    scene.good("backup", "--disk", f"d={disk}", scene.ours / "vm.vma")
    subprocess.run(
        ["zstd", "-q", scene.ours / "vm.vma", "-o", scene.ours / "vm.vma.zst"], check=True
    )
    for archive, more in (
        ("vm.vma", ("--cow", out / "writes", "--index-cache", out / "index")),
        ("vm.vma.zst", ("--cache", out)),
    ):
        words = scene.words(
            *("serve", scene.ours / archive, "--listen", out / "s", "--device", "d", *more)
        )
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as served:
            try:
                while not (out / "s").exists():
                    assert served.poll() is None
            finally:
                end(served)
        assert not (out / "s").exists()
    assert scene.wrong() == []


def test_files_that_are_taken_out_of_an_archive(need: Need, scene: Scene) -> None:
    (mkfs,) = need("mkfs.ext4")
    tree, out = scene.ours / "tree", scene.theirs / "out"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_bytes(b"x" * 70_000)
    (tree / "a" / "link").symlink_to("b/file")
    subprocess.run(
        [mkfs, "-q", "-d", tree, scene.ours / "disk", "8M"], check=True, capture_output=True
    )
    scene.good("backup", "--disk", f"d={scene.ours / 'disk'}", scene.ours / "vm.vma")
    index = ("--index-cache", out / "index")
    scene.good("files", "cp", scene.ours / "vm.vma", "/a", out, *index)
    assert (out / "a" / "b" / "file").read_bytes() == b"x" * 70_000
    assert (out / "a" / "link").is_symlink()
    assert scene.wrong() == []


def test_a_backup_of_another_users_qemu_and_a_cleanup_after_it(scene: Scene) -> None:
    nodes = [
        {
            "node-name": "vmapipe-cafe-0",
            "drv": "nbd",
            "file": f"nbd+unix:///disk?socket={scene.theirs}/t/vmapipe-sinks-0a0a0a0a/0.sock",
            "image": {"virtual-size": 65536},
        }
    ]

    def deleted(*words: object) -> dict[str, object]:
        nodes.clear()
        return {}

    odd = {"query-named-block-nodes": lambda *words: nodes, "blockdev-del": deleted}
    with hostile_qemu(scene.theirs / "q", odd):
        os.chown(scene.theirs / "q", NOBODY, NOBODY)
        scene.good("cleanup", "--qmp", scene.theirs / "q")
    with hostile_qemu(scene.theirs / "r", {"blockdev-add": Refusal("no")}):
        os.chown(scene.theirs / "r", NOBODY, NOBODY)
        words = scene.words("backup", "--qmp", scene.theirs / "r", scene.theirs / "out" / "vm.vma")
        done = subprocess.run(words, capture_output=True, timeout=2 * LIMIT_S)
    assert b"QEMU refuses the backup" in done.stderr
    assert scene.wrong() == []
    assert list((scene.theirs / "t").iterdir()) == []


def test_a_service_and_a_backup_that_goes_to_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(scene.ours / "disk", "AA0")
    server, clients = make_keys(scene.ours, "alice")
    with monkeypatch.context() as patch:
        patch.setattr("tests.machine.VMAPIPE", scene.words())
        service = serving(scene.theirs / "store", "--per-client", keys=(server, clients["alice"]))
        served = service.__enter__()
    try:
        scene.good("backup", "--disk", f"d={disk}", *served.words, "vm.vma")
        assert (scene.theirs / "store" / "alice" / "vm.vma").exists()
    finally:
        end(served.process)
        service.__exit__(None, None, None)
    assert scene.wrong() == []


def end(strace: subprocess.Popen[bytes]) -> None:
    """Its program: signals to strace itself end nobody else."""
    for child in psutil.Process(strace.pid).children():
        child.terminate()
    strace.communicate(timeout=LIMIT_S)


def test_a_monitor(scene: Scene) -> None:
    disk = make_disk(scene.ours / "disk", "AA0")
    export = scene.theirs / "export.sock"
    words = scene.words(
        *("monitor", "--listen", scene.ours / "m", "--disk", f"d={disk}"),
        *("--export", f"d={export}", "--socket-mode", "666"),
    )
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as monitor:
        try:
            while not (listens(scene.ours / "m") and export.exists()):
                assert monitor.poll() is None
            assert (export.stat().st_mode & 0o777) == 0o666
        finally:
            end(monitor)
    assert not export.exists()
    assert scene.wrong() == []
