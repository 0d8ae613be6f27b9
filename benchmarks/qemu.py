# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.qemu`: what a guest of QEMU feels of a backup, ours and QEMU's own.

The disk is a qemu-storage-daemon's, whose jobs are QEMU's; the guest is fio on a
writable export of it, 4K random writes at queue depth 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.images import dense
from benchmarks.place import VMAPIPE
from benchmarks.servers import wait_for_event
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

#: The bar: a backup by vmapipe lets a guest wait hardly longer than QEMU's own.
MOST = 1.2
# fio ends first: the image has to be so large that no backup is done by then.
_RUN_S = 2
# A guest, unlike a benchmark, does not write as fast as it is answered.
_RATE_IOPS = 1000
_SLOW_BYTES_S = 20 * 10**6
_POLL_S = 0.01


class Felt(NamedTuple):
    """One run of fio, in microseconds."""

    p50: float
    p99: float
    longest: float
    written: int


class Machine:
    """A qemu-storage-daemon with one disk, `d`."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.folder = folder
        self.qmp, self.second = folder / "qmp.sock", folder / "second.sock"
        self.nbd = folder / "nbd.sock"
        words = [
            *("qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={self.nbd}"),
            *("--blockdev", f"driver=file,node-name=f,filename={image}"),
            *("--blockdev", "driver=raw,node-name=d,file=f"),
            *("--export", "type=nbd,id=e,node-name=d,name=d,writable=on"),
        ]
        for name, path in (("qmp", self.qmp), ("second", self.second)):
            words += ["--chardev", f"socket,id={name},path={path},server=on,wait=off"]
            words += ["--monitor", f"chardev={name}"]
        self.process = subprocess.Popen(words)
        while not self.second.exists():
            time.sleep(_POLL_S)

    def ask(self, name: str, **arguments: object) -> list[dict[str, object]]:
        qmp = QmpClient(str(self.second))
        try:
            answer = qmp.execute(Command(name, arguments))
        finally:
            qmp.close()
        return answer if isinstance(answer, list) else []

    def is_idle(self) -> bool:
        return not self.ask("query-jobs")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


Way = Callable[[Machine], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def without(machine: Machine) -> Iterator[None]:
    yield


def by_qemu(workers: int = 0) -> Way:
    """QEMU's own job to a raw file beside, with its defaults or with so many workers."""

    @contextlib.contextmanager
    def way(machine: Machine) -> Iterator[None]:
        target = machine.folder / "target.raw"
        with target.open("wb") as file:
            file.truncate(os.path.getsize(machine.folder / "image.raw"))
        node = {"driver": "file", "node-name": "t", "filename": str(target)}
        machine.ask("blockdev-add", **node)
        perf = {"x-perf": {"max-workers": workers}} if workers else {}
        job = {"job-id": "own", "device": "d", "target": "t", "sync": "full", **perf}
        actions = [{"type": "blockdev-backup", "data": {**job, "auto-dismiss": False}}]
        machine.ask("transaction", actions=actions)
        yield
        _has_lasted(machine)
        machine.ask("job-cancel", id="own")
        while any(job["status"] != "concluded" for job in machine.ask("query-jobs")):
            time.sleep(_POLL_S)
        machine.ask("job-dismiss", id="own")
        machine.ask("blockdev-del", **{"node-name": "t"})
        target.unlink()

    return way


def by_vmapipe(*words: str, slow: bool = False) -> Way:
    """To a file beside, or `slow`: into a pipe that is read at 19 MiB/s."""

    @contextlib.contextmanager
    def way(machine: Machine) -> Iterator[None]:
        archive = machine.folder / "vm.vma"
        out = "-" if slow else str(archive)
        command = [*VMAPIPE, "backup", "--json", "--qmp", str(machine.qmp), "--disk", "d"]
        with subprocess.Popen(
            [*command, *words, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            stdout, stderr = process.stdout, process.stderr
            if slow and stdout is not None:
                threading.Thread(target=_sip, args=(stdout.fileno(),), daemon=True).start()
                # With the archive on standard output, the words are on the other one.
                process.stdout = stderr
            wait_for_event(process, "instant")
            process.stdout = stdout
            yield
            _has_lasted(machine)
            process.terminate()
            process.wait()
        while not machine.is_idle():
            time.sleep(_POLL_S)

    return way


def _sip(fd: int) -> None:
    started, taken = time.monotonic(), 0
    with contextlib.suppress(OSError):
        while data := os.read(fd, 1 << 16):
            taken += len(data)
            time.sleep(max(0.0, started + taken / _SLOW_BYTES_S - time.monotonic()))


def _has_lasted(machine: Machine) -> None:
    if machine.is_idle():
        raise SystemExit("a backup was over before fio: choose a larger --size")


WAYS: dict[str, Way] = {
    "no backup": without,
    "QEMU to a raw file": by_qemu(),
    "QEMU, 4 workers": by_qemu(4),
    "vmapipe": by_vmapipe(),
    "vmapipe --speed 100M": by_vmapipe("--speed", "100M"),
    "vmapipe, 19 MiB/s": by_vmapipe(slow=True),
}
_PEERS = ("QEMU to a raw file", "QEMU, 4 workers")


def fio(machine: Machine) -> Felt:
    """Raises SystemExit for any error that fio has seen."""
    output = machine.folder / "fio.json"
    words = [
        *("fio", "--name=guest", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=1"),
        *("--randrepeat=0", "--norandommap", f"--runtime={_RUN_S}", "--time_based"),
        *(f"--rate_iops={_RATE_IOPS}", "--lat_percentiles=1", "--percentile_list=50:99"),
        *(
            "--output-format=json",
            f"--output={output}",
            f"--uri=nbd+unix:///d?socket={machine.nbd}",
        ),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=machine.folder)
    (job,) = json.loads(output.read_text())["jobs"] if not done.returncode else ({"error": 1},)
    if job["error"]:
        raise SystemExit(f"fio failed:\n{done.stdout}{done.stderr}")
    latency = job["write"]["lat_ns"]
    p50, p99 = (latency["percentile"][f"{percent}.000000"] for percent in (50, 99))
    return Felt(p50 / 1000, p99 / 1000, latency["max"] / 1000, job["write"]["total_ios"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qemu", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, metavar="MIB", help="default: 4096")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--folder", type=Path, help="where images and archives go (default: temp)")
    options = parser.parse_args()
    missing = [name for name in ("fio", "qemu-storage-daemon") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="vmapipe-bench-", dir=options.folder) as name:
        felt = measure(Path(name), options.size, options.rounds)
    return report(felt)


def measure(folder: Path, size_mib: int, rounds: int) -> dict[str, list[Felt]]:
    felt: dict[str, list[Felt]] = {name: [] for name in WAYS}
    image = dense(folder / "image.raw", size_mib)
    chance = random.Random(1)
    machine = Machine(image, folder)
    try:
        for turn in range(-1, rounds):
            order = list(WAYS)
            chance.shuffle(order)
            for name in order:
                os.sync()  # what the run before has left is not this one's work
                with WAYS[name](machine):
                    run = fio(machine)
                if turn >= 0:  # the first round warms up
                    felt[name].append(run)
    finally:
        machine.close()
    return felt


def report(felt: dict[str, list[Felt]]) -> int:
    print(f"4K random writes, {_RATE_IOPS} a second at most, during a backup")
    for name, runs in felt.items():
        middle = Felt(*(statistics.median(column) for column in zip(*runs, strict=True)))
        print(
            f"  {name:<22} median {middle.p50:6.0f} us   p99 {middle.p99:7.0f} us   "
            f"longest {middle.longest / 1000:6.1f} ms   {middle.written:5.0f} writes"
        )
    for name in felt:
        for peer in _PEERS if name.startswith("vmapipe") else ():
            pairs = zip(felt[name], felt[peer], strict=True)
            ratios = [ours.p99 / theirs.p99 for ours, theirs in pairs]
            ratio = statistics.median(ratios)
            print(
                f"  p99 of {name} / {peer}: {ratio:.2f} x ({min(ratios):.2f} .. "
                f"{max(ratios):.2f}), at most {MOST}: {'met' if ratio <= MOST else 'MISSED'}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
