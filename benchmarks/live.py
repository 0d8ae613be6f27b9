# SPDX-License-Identifier: Apache-2.0
"""Disks of a running QEMU, beside QEMU's own backup job: a storage daemon, which all rounds share."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.images import MIB, dense, qcow2
from benchmarks.measure import OURS, Bound, Case, Command
from benchmarks.place import Place, make, vmapipe

OWN = "QEMU's own job"
_OWN_JOB = Path(__file__).with_name("own_job.py")
_THIN_GIB = 64


def live_cases(place: Place) -> list[Case]:
    """To nothing: QEMU's own job writes to nbdkit's null, ours to /dev/null. To a file: both on disk, at the end."""
    quarter = place.disk / "live.qcow2"
    thin = place.disk / "thin.qcow2"
    hole = place.disk / "hole.raw"

    def empty(path: Path) -> Callable[[], None]:
        kind = path.suffix.removeprefix(".")
        return lambda: make(["qemu-img", "create", "-q", "-f", kind, str(path), f"{_THIN_GIB}G"])

    return [
        _life(place),
        *_life_parts(place),
        _to_nothing(place, "dense", place.dense, 1.05),
        _to_file(place, "dense", place.dense, 0.8),
        _to_nothing(place, "25 % data and holes", place.quarter, 1.1),
        _to_nothing(
            *(place, "25 % data and holes, qcow2", quarter, 1.1),
            before=lambda: qcow2(quarter, place.quarter),
        ),
        _to_file(place, "25 % data and holes", place.quarter, 1.0),
        _empty(place, "qcow2", thin, empty(thin)),
        _empty(place, "raw", hole, empty(hole)),
    ]


class _Sockets:
    """Where a case's processes are, in a folder that is there while the case runs."""

    def __init__(self, place: Place, what: str) -> None:
        # Not below the images: a socket's path is short.
        self.folder = Path(tempfile.gettempdir()) / f"vmapipe-live-{abs(hash((place, what))):x}"
        self.qmp, self.null = self.folder / "qmp", self.folder / "null"

    def ours(self, *words: str | Path) -> list[str]:
        return vmapipe("backup", "--quiet", "--qmp", self.qmp, "--disk", "d", *words)

    def own(self, target: str | Path) -> list[str]:
        return [sys.executable, str(_OWN_JOB), str(self.qmp), "d", str(target)]

    def beside(
        self, image: Path, size_bytes: int
    ) -> Callable[[], contextlib.AbstractContextManager[Sequence[int]]]:
        """Return what runs a storage daemon with the disk `d`, and an NBD server that takes all."""
        node = "qcow2" if image.suffix == ".qcow2" else "raw"
        daemon = [
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={image}"),
            *("--blockdev", f"driver={node},node-name=d,file=file"),
            *("--chardev", f"socket,id=qmp,path={self.qmp},server=on,wait=off"),
            *("--monitor", "chardev=qmp"),
        ]
        null = ["nbdkit", "-f", "-U", str(self.null), "null", str(size_bytes)]

        @contextlib.contextmanager
        def running() -> Iterator[Sequence[int]]:
            with contextlib.ExitStack() as stack:
                self.folder.mkdir(exist_ok=True)
                stack.callback(shutil.rmtree, self.folder)
                for path in (self.qmp, self.null):
                    path.unlink(missing_ok=True)
                processes = []
                for words, path in ((daemon, self.qmp), (null, self.null)):
                    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
                    stack.callback(process.wait)
                    stack.callback(process.terminate)
                    processes.append(process)
                    while not path.exists():
                        if process.poll() is not None:
                            raise SystemExit(f"{words[0]} does not start")
                        time.sleep(0.01)
                yield [process.pid for process in processes]

        return running


def _life(place: Place) -> Case:
    """What a backup takes that copies next to nothing: from the command to the prompt."""
    image = place.disk / "life.raw"
    sockets = _Sockets(place, "life")
    python = "python3 -c 'import zmq, msgpack'"
    return Case(
        "backup of a running QEMU's disk of 1 MiB (start to end)",
        [
            Command(OURS, sockets.ours("/dev/null"), needs="qemu-storage-daemon"),
            Command(python, [sys.executable, "-c", "import zmq, msgpack"]),
        ],
        # 0.1 s of it are the guardian's own start, beside the rest where there are two cores.
        [Bound("at most 8 x, 12 x on one core", OURS, python, 8.0, one_core=12.0)],
        before=lambda: dense(image, 1),
        leaves=[image],
        beside=sockets.beside(image, MIB),
    )


def _life_parts(place: Place) -> list[Case]:
    """The two parts of it that a guest waits for, or whoever wants to switch a machine off."""
    image = place.disk / "life-parts.raw"
    cases = []
    for what, since, until, limit in (
        ("from the command to the instant", "", "instant", 0.5),
        ("from the last byte to the prompt", "transfer", "", 0.2),
    ):
        sockets = _Sockets(place, what)
        words = vmapipe("backup", "--json", "--qmp", sockets.qmp, "--disk", "d", "/dev/null")
        cases.append(
            Case(
                f"backup of a running QEMU, 16 MiB: {what}",
                [Command(OURS, words, None, "qemu-storage-daemon", since, until)],
                [Bound(f"at most {limit} s", OURS, "", limit)],
                before=lambda: dense(image, 16),
                leaves=[image],
                beside=sockets.beside(image, 16 * MIB),
            )
        )
    return cases


def _to_nothing(
    place: Place, what: str, image: Path, limit: float, before: Callable[[], object] | None = None
) -> Case:
    sockets = _Sockets(place, f"nothing {what}")
    gib = place.size_mib / 1024
    return Case(
        f"backup of a running QEMU, {what}, to nothing",
        [
            Command(OURS, sockets.ours("--no-manifest", "/dev/null"), needs="qemu-storage-daemon"),
            Command(OWN, sockets.own(f"nbd:{sockets.null}"), needs="nbdkit"),
        ],
        [
            Bound(f"at most {limit} x QEMU's own job into nbdkit null", OURS, OWN, limit),
            # Of the daemon, too. The C tool takes 0.3 s a GiB of a disk at rest.
            Bound("CPU seconds a GiB: at most QEMU's own job's", OURS, OWN, 1.0, cpu=True, gib=gib),
        ],
        warm=[image],
        before=before,
        leaves=[image] if before else [],
        beside=sockets.beside(image, place.size_mib * MIB),
    )


def _to_file(place: Place, what: str, image: Path, limit: float) -> Case:
    sockets = _Sockets(place, f"file {what}")
    archive, target = place.disk / "live.vma", place.disk / "live-own.raw"
    own = [*sockets.own(target)]
    return Case(
        f"backup of a running QEMU, {what}, to a file on disk, flushed",
        [
            Command(OURS, sockets.ours(archive), archive, needs="qemu-storage-daemon"),
            Command(OWN, f"truncate -s {place.size_mib}M {target} && exec {' '.join(own)}", target),
        ],
        [Bound(f"at most {limit} x QEMU's own job to a raw file", OURS, OWN, limit)],
        pinned=False,
        warm=[image],
        leaves=[target, archive, Path(f"{archive}.manifest.json")],
        beside=sockets.beside(image, place.size_mib * MIB),
    )


def _empty(place: Place, what: str, image: Path, before: Callable[[], object]) -> Case:
    sockets = _Sockets(place, f"empty {what}")
    return Case(
        f"backup of a running QEMU, {_THIN_GIB} GiB without data ({what}), to nothing",
        [Command(OURS, sockets.ours("/dev/null"), needs="qemu-storage-daemon")],
        [Bound("at most 0.5 s", OURS, "", 0.5)],
        before=before,
        leaves=[image],
        beside=sockets.beside(image, _THIN_GIB << 30),
    )
