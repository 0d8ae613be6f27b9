# SPDX-License-Identifier: Apache-2.0
"""A guest on a slow disk, whose load comes in steps, while it is backed up: what it feels, and for how long.

    .venv/bin/python -m benchmarks.latency

The disk is an image behind nbdkit, which allows so many bytes a second and lets each request wait; the
guest is a QEMU's own device, whose requests come at a rate that changes: QEMU counts them itself. On a
machine that is busy with other work even the guest without a backup exceeds the bound: begin the
command with `chrt -r 1`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.images import dense
from benchmarks.place import VMAPIPE
from benchmarks.servers import wait_for_event
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command
from vmapipe.runtime.latency import bounds_ns, felt_of

_DEVICE = "/machine/peripheral/v0/virtio-backend"
_BOUND_S = 0.02
_POLL_S = 0.01
#: In the first ones a backup has to find out.
_FIRST_SECONDS = 3
#: Seconds, and requests of the guest a second: it works, works hard, rests, and works again.
STEPS = ((6.0, 50), (6.0, 200), (6.0, 0), (6.0, 50))


class Guest:
    """A paused QEMU on a slow disk; `work` lets its device write and read as a guest would."""

    def __init__(self, folder: Path, image: Path, rate_mib: int, delay_ms: int) -> None:
        self.folder, self.image = folder, image
        nbd, self.qmp, second = folder / "nbd.sock", folder / "qmp.sock", folder / "second.sock"
        self.third = folder / "third.sock"
        kit = [
            "nbdkit",
            "-f",
            "-U",
            str(nbd),
            "--filter=rate",
            "--filter=delay",
            "file",
            str(image),
        ]
        kit += [f"rate={rate_mib * 8}M", "burstiness=0.1"]
        kit += [f"rdelay={delay_ms}ms", f"wdelay={delay_ms}ms"] if delay_ms else []
        self._kit = subprocess.Popen(kit)
        _wait_for(nbd)
        words = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-m", "64"]
        words += ["-machine", "q35", "-accel", "tcg", "-blockdev"]
        words += [f"driver=nbd,node-name=disk,server.type=unix,server.path={nbd}"]
        words += ["-device", "virtio-blk-pci,drive=disk,id=v0"]
        for path in (self.qmp, second, self.third):
            words += ["-qmp", f"unix:{path},server=on,wait=off"]
        self._said = (folder / "said").open("wb")
        self._qemu = subprocess.Popen(words, stdout=self._said)
        _wait_for(self.third)
        self.monitor = QmpClient(str(second))

    def ask(self, name: str, **arguments: Any) -> Any:
        return self.monitor.execute(Command(name, arguments))

    def work(self, seconds: float, per_s: int, chance: random.Random) -> None:
        started, done = time.monotonic(), 0
        most = self.image.stat().st_size >> 12
        while (passed := time.monotonic() - started) < seconds:
            due = int(passed * per_s)
            if done >= due:
                time.sleep(_POLL_S)
                continue
            kind = "aio_write -q" if chance.random() < 0.5 else "aio_read -q"
            line = f'qemu-io -d {_DEVICE} "{kind} {chance.randrange(most) << 12} 4096"'
            self.ask("human-monitor-command", **{"command-line": line})
            done += 1

    def close(self) -> None:
        self.monitor.close()
        for process in (self._qemu, self._kit):
            process.terminate()
            process.wait()
        self._said.close()


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(_POLL_S)


class Watch(threading.Thread):
    """What the guest feels each second, by QEMU's histograms: those of the backup, or else our own."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path, self._over = path, threading.Event()
        self._boundaries = bounds_ns(_BOUND_S)
        self._before: list[int] = []
        #: Of each second: the 99th percentile.
        self.seconds: list[float] = []

    def run(self) -> None:
        monitor = QmpClient(str(self._path))
        try:
            while not self._over.wait(1.0):
                self._look(monitor)
        finally:
            monitor.execute(Command("block-latency-histogram-set", {"id": _DEVICE}))
            monitor.close()

    def _look(self, monitor: QmpClient) -> None:
        stats = monitor.execute(Command("query-blockstats", {}))[0]["stats"]
        bins = [stats.get(f"{kind}_latency_histogram", {}).get("bins") for kind in ("rd", "wr")]
        if not all(bins):
            arguments: dict[str, Any] = {"id": _DEVICE}
            for kind in ("read", "write"):
                arguments[f"boundaries-{kind}"] = self._boundaries
            monitor.execute(Command("block-latency-histogram-set", arguments))
            self._before = []
            return
        counts = [sum(pair) for pair in zip(*bins, strict=True)]
        before, self._before = self._before or [0] * len(counts), counts
        new = [max(0, now - then) for now, then in zip(counts, before, strict=True)]
        self.seconds.append(felt_of(self._boundaries, new, _BOUND_S).p99_s)

    def end(self) -> list[float]:
        self._over.set()
        self.join()
        return self.seconds


@contextlib.contextmanager
def by_qemu(guest: Guest) -> Iterator[None]:
    """QEMU's own job to a raw file, as it is without any option."""
    target = guest.folder / "target.raw"
    with target.open("wb") as file:
        file.truncate(guest.image.stat().st_size)
    guest.ask("blockdev-add", **{"driver": "file", "node-name": "t", "filename": str(target)})
    job = {"job-id": "own", "device": "disk", "target": "t", "sync": "full"}
    guest.ask("blockdev-backup", **job, **{"auto-dismiss": False})
    yield
    guest.ask("job-cancel", id="own")
    while any(job["status"] != "concluded" for job in guest.ask("query-jobs")):
        time.sleep(_POLL_S)
    guest.ask("job-dismiss", id="own")
    guest.ask("blockdev-del", **{"node-name": "t"})
    target.unlink()


@contextlib.contextmanager
def by_vmapipe(guest: Guest, words: Sequence[str]) -> Iterator[None]:
    archive = guest.folder / "vm.vma"
    command = [*VMAPIPE, "backup", "--json", "--qmp", str(guest.qmp), *words, str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        wait_for_event(process, "instant")
        reader = threading.Thread(target=_drain, args=(process,), daemon=True)
        reader.start()
        yield
        process.terminate()
        process.wait()
        reader.join()  # before its pipe is closed


def _drain(process: subprocess.Popen[bytes]) -> None:
    for _ in process.stdout or ():
        pass


WAYS: dict[str, Sequence[str] | None] = {
    "no backup": None,
    "QEMU's own job": None,
    "vmapipe": (),
    "vmapipe --speed 20M": ("--speed", "20M"),
    "vmapipe --guest-latency 20ms": ("--guest-latency", "20ms", "--latency-floor", "2M"),
}


class Result(NamedTuple):
    """Of one run: each second's 99th percentile, and how far the backup came."""

    seconds: list[float]
    copied_bytes: int


def one(guest: Guest, name: str, chance: random.Random) -> Result:
    words = WAYS[name]
    if words is not None:
        way: contextlib.AbstractContextManager[None] = by_vmapipe(guest, words)
    else:
        way = by_qemu(guest) if name.startswith("QEMU") else contextlib.nullcontext()
    with way:
        watch = Watch(guest.third)
        watch.start()
        for seconds, per_s in STEPS:
            guest.work(seconds, per_s, chance)
        jobs = guest.ask("query-jobs")
        copied = jobs[0]["current-progress"] if jobs else 0
        return Result(watch.end(), copied)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--rate", type=int, default=40, metavar="MIB/S", help="default: 40")
    parser.add_argument("--delay", type=int, default=1, metavar="MS", help="default: 1")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", default="", metavar="WORD", help="ways with this in their name")
    parser.add_argument("--folder", type=Path, help="where images and archives go (default: temp)")
    options = parser.parse_args()
    missing = [name for name in ("nbdkit", "qemu-system-x86_64") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    chance = random.Random(1)
    length_s = sum(seconds for seconds, _ in STEPS)
    results: dict[str, list[Result]] = {name: [] for name in WAYS if options.only in name}
    with tempfile.TemporaryDirectory(prefix="vmapipe-bench-", dir=options.folder) as name:
        # It lasts longer than the guest works, whoever copies it.
        image = dense(Path(name) / "image.raw", round(2 * options.rate * length_s))
        for _ in range(options.rounds):
            order = list(results)
            chance.shuffle(order)
            for way in order:
                folder = Path(name) / "run"
                folder.mkdir()
                with contextlib.closing(Guest(folder, image, options.rate, options.delay)) as guest:
                    results[way].append(one(guest, way, chance))
                shutil.rmtree(folder)
    report(results)
    return 0


def report(results: dict[str, list[Result]]) -> None:
    print(f"steps (seconds, requests a second): {STEPS}; the bound is {1000 * _BOUND_S:.0f} ms")
    for name, runs in results.items():
        seconds = [second for run in runs for second in run.seconds[_FIRST_SECONDS:]]
        above = [second > _BOUND_S for second in seconds]
        copied = statistics.median(run.copied_bytes for run in runs) / (1 << 20)
        print(
            f"  {name:<30} worst second {1000 * max(seconds):6.0f} ms   median "
            f"{1000 * statistics.median(seconds):6.1f} ms   {100 * sum(above) / len(above):3.0f} % of "
            f"the seconds above   {copied:6.0f} MiB copied"
        )
        print("    " + " ".join(f"{1000 * second:.0f}" for second in runs[-1].seconds))


if __name__ == "__main__":
    sys.exit(main())
