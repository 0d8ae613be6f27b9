# SPDX-License-Identifier: Apache-2.0
"""`vmapipe status`, `cancel`, `speed`: backups that are running, seen and steered from outside."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vmapipe.control.coordinator.job_client import JobClient
from vmapipe.control.coordinator.render import human_time
from vmapipe.control.coordinator.status_socket import sockets
from vmapipe.runtime.arguments import make_parser, size
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.process import run
from vmapipe.runtime.text import MAX_NAME_CHARS, human_bytes, one_line

_WHICH = """\
JOB is the beginning of a job's id or of its archive's uuid, or the archive's
path. Backups of the same user are found (as root: of root).
"""

STATUS = f"""\
Show the progress of the backups that run on this host: each disk's bytes read, sent,
found zero, and saved before the guest overwrote them; what waits in memory and
in the spool file; rates, time left, processes.
{_WHICH}"""

CANCEL = f"""\
Cancel a running backup: nothing of it is stored, and the guest goes on.
{_WHICH}"""

SPEED = f"""\
Change the speed limit of a running backup, for all its disks together.
{_WHICH}"""

STATUS_EPILOG = """\
examples:
  vmapipe status
  vmapipe status --watch
  vmapipe status --json | jq .rate_bytes_s

exit codes: 0 shown (also when no backup is running), 1 failed, 2 wrong use
"""

CANCEL_EPILOG = """\
examples:
  vmapipe cancel                 # the one that is running
  vmapipe cancel /backup/vm.vma

exit codes: 0 the backup has ended, 1 failed, 2 wrong use
"""

SPEED_EPILOG = """\
examples:
  vmapipe speed 20M
  vmapipe speed 3f2a 0           # no limit

exit codes: 0 changed, 1 failed, 2 wrong use
"""

# A cancelled backup first ends QEMU's jobs and removes its partial file.
_END_S = 60.0


def main_status(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, STATUS, STATUS_EPILOG)
    _add_job(parser, "all")
    parser.add_argument(
        "--json", action="store_true", help="a JSON line a job (default unless on a terminal)"
    )
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=2.0,
        default=0.0,
        metavar="SECONDS",
        help="again and again (default: every 2 seconds), until the job has ended or Ctrl-C",
    )
    options = parser.parse_args(argv)
    if options.watch < 0 or options.watch > 86400:
        parser.error("--watch takes seconds from 0.1 to 86400")
    return run(prog, lambda: _status(options))


def main_cancel(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, CANCEL, CANCEL_EPILOG)
    _add_job(parser, "the one that is running")
    options = parser.parse_args(argv)
    return run(prog, lambda: _cancel(options.job))


def main_speed(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, SPEED, SPEED_EPILOG)
    _add_job(parser, "the one that is running")
    parser.add_argument(
        "rate", type=size, metavar="BYTES/S", help="K, M, G, T are powers of 1024; 0: no limit"
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _set_speed(options.job, options.rate))


def _add_job(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help=f"which one (default: {default})")


def _status(options: argparse.Namespace) -> None:
    table = sys.stdout.isatty() and not options.json
    before: dict[str, Any] = {}
    while True:
        jobs = running_jobs()
        if options.job:
            jobs = [matching(jobs, options.job)] if not before else _same(jobs, before)
        if table:
            _show(jobs, before, clear=bool(options.watch))
        else:
            for job in jobs:
                print(json.dumps(job), flush=True)
        if not options.watch or (options.job and not jobs):
            return
        before = {job["job"]: job for job in jobs}
        time.sleep(max(0.1, options.watch))


def _same(jobs: list[dict[str, Any]], before: dict[str, Any]) -> list[dict[str, Any]]:
    return [job for job in jobs if job["job"] in before]


def _show(jobs: list[dict[str, Any]], before: dict[str, Any], *, clear: bool) -> None:
    # Imported here: JSON needs no words.

    blocks = ["\n".join(job_lines(job, before.get(job["job"]))) for job in jobs]
    text = "\n\n".join(blocks) or "no backup is running"
    sys.stdout.write(("\x1b[H\x1b[2J" if clear else "") + text + "\n")
    sys.stdout.flush()


def _cancel(wanted: str | None) -> None:
    with JobClient(_socket_of(wanted)) as client:
        archive = client.execute("query-job")["archive"]
        client.execute("backup-cancel")
        if not client.wait_for_end(_END_S):
            raise Failure(
                f"{archive}: told to end, and has not ended within {_END_S:.0f} s; "
                "`vmapipe status` shows its processes"
            )
    print(one_line(f"{archive}: ended"))


def _set_speed(wanted: str | None, rate: int) -> None:
    with JobClient(_socket_of(wanted)) as client:
        client.execute("backup-set-speed", speed=rate)


def running_jobs() -> list[dict[str, Any]]:
    """Return the answer of each, the oldest first. Those that end just now are left out."""
    found = []
    for path in sockets().values():
        try:
            with JobClient(path) as client:
                found.append(client.execute("query-job"))
        except Failure as failure:
            if os.path.exists(path):
                print(one_line(f"vmapipe: {failure}"), file=sys.stderr)
    return sorted(found, key=lambda job: float(job["started"]))


def matching(jobs: Sequence[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """Raises Failure unless exactly one is meant."""
    plain = wanted.replace("-", "").lower()
    fits = [
        job
        for job in jobs
        if (plain and (job["job"].startswith(plain) or job["uuid"].startswith(plain)))
        or job["archive"] in (wanted, os.path.abspath(wanted))
    ]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise Failure(f"{wanted!r} may be any of {_names(fits)}; say more of it")
    raise Failure(f"no running backup is called {wanted!r}; there is {_names(jobs)}")


def _names(jobs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{job['job'][:8]} ({job['archive']})" for job in jobs) or "none at all"


def _socket_of(wanted: str | None) -> str:
    """Raises Failure."""
    jobs = running_jobs()
    if wanted is not None:
        return sockets_path(matching(jobs, wanted))
    if not jobs:
        raise Failure("no backup of this user is running")
    if len(jobs) > 1:
        raise Failure(f"several backups are running, so say which: {_names(jobs)}")
    return sockets_path(jobs[0])


def sockets_path(job: dict[str, Any]) -> str:
    """Raises Failure when it has ended meanwhile."""
    path = sockets().get(job["job"])
    if path is None:
        raise Failure(f"{job['archive']}: the backup has just ended")
    return path


Details = Mapping[str, Any]

# Column heads of the disks' table, and the fields below them.
_DISK_COLUMNS = (
    ("READ", "read_bytes"),
    ("SENT", "sent_bytes"),
    ("ZERO", "zero_bytes"),
    ("SAVED", "saved_bytes"),
    ("BUFFERED", "memory_bytes"),
    ("SPOOLED", "spool_bytes"),
)


def job_lines(job: Details, before: Details | None = None) -> list[str]:
    """`before`: the same job some time ago; processors are then those of the time between."""
    lines = [f"{one_line(job['archive'])}  {job['job'][:8]}  {_progress(job)}"]
    if job["plain_bytes"]:
        ratio = 100 * job["stored_bytes"] / job["plain_bytes"]
        lines.append(
            f"  archive so far: {human_bytes(job['stored_bytes'])}, "
            f"{ratio:.0f} % of {human_bytes(job['plain_bytes'])} before compression"
        )
    lines += _base_lines(job)
    lines += latency_lines(job)
    lines += _indented(_disks(job["devices"]))
    lines += _indented(_processes(job, before))
    return lines


def _base_lines(job: Details) -> list[str]:
    if not job.get("base"):
        return []
    unchanged = sum(disk.get("unchanged_bytes", 0) for disk in job["devices"])
    return [
        f"  base: {one_line(job['base'])}, as in which {human_bytes(unchanged)} are so far",
        *(
            f"  in full: {one_line(disk['name'], MAX_NAME_CHARS)}: {one_line(reason)}"
            for disk in job["devices"]
            if (reason := disk.get("full_reason"))
        ),
    ]


_BARS = " ▁▂▃▄▅▆▇█"


def _curve(values: Sequence[float], most: float) -> str:
    """Return a curve of one line; `most` is the height of its highest bar, and only nothing has none."""
    steps = len(_BARS) - 1
    heights = [min(steps, math.ceil(steps * value / most)) if most > 0 else 0 for value in values]
    return "".join(_BARS[max(0, height)] for height in heights)


def latency_lines(job: Details) -> list[str]:
    """What the guest feels, and what is read: curves of the last minute."""
    felt = job.get("guest_latency")
    if not felt:
        return []
    waits, rates = felt["last_p99_s"], felt["last_read_bytes_s"]
    limit = felt["limit_bytes_s"]
    return [
        f"  guest waits {_ms(felt['p99_s'])} (bound {_ms(felt['bound_s'])}, worst second "
        f"{_ms(felt['worst_s'])}), so the backup may read "
        + (f"{human_bytes(limit)}/s" if limit else "as fast as it can"),
        f"    waits, up to {_ms(max(waits)):>9}  {_curve(waits, max(waits))}",
        f"    reads, up to {human_bytes(max(rates)):>7}/s  {_curve(rates, max(rates))}",
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _progress(job: Details) -> str:
    if not job["devices"]:
        return "is starting"
    total, done = job["total_bytes"], job["done_bytes"]
    parts = [f"{_percent(done, total)} of {human_bytes(total)}"]
    parts.append(f"{human_bytes(job['rate_bytes_s'])}/s")
    # Holes and zeroes are done without much reading, and the limit is one on that.
    parts.append(f"reads {human_bytes(job['read_rate_bytes_s'])}/s")
    if job["speed_bytes_s"]:
        parts[-1] += f" (limit {human_bytes(job['speed_bytes_s'])}/s)"
    parts.append(f"{human_time(job['seconds'])} so far")
    if done == total:
        parts.append("finishing")
    elif job["left_s"] is not None:
        parts.append(f"{human_time(job['left_s'])} left")
    return ", ".join(parts)


def _disks(devices: Sequence[Details]) -> list[Sequence[str]]:
    if not devices:
        return []
    rows: list[Sequence[str]] = [
        ("DISK", "DONE", *(head for head, _ in _DISK_COLUMNS), "WAITING WRITES")
    ]
    for disk in devices:
        sizes = [human_bytes(disk[name]) for _, name in _DISK_COLUMNS]
        done = _percent(disk["done_bytes"], disk["bytes"])
        rows.append(
            (one_line(disk["name"], MAX_NAME_CHARS), done, *sizes, str(disk["waiting_writes"]))
        )
    return rows


def _processes(job: Details, before: Details | None) -> list[Sequence[str]]:
    earlier = {process["pid"]: process for process in before["processes"]} if before else {}
    rows: list[Sequence[str]] = [("PROCESS", "PID", "CPU", "MEMORY")]
    for process in job["processes"]:
        was = earlier.get(process["pid"], {"cpu_s": 0.0, "age_s": 0.0})
        seconds = max(0.01, process["age_s"] - was["age_s"])
        cpu = f"{100 * (process['cpu_s'] - was['cpu_s']) / seconds:.0f} %"
        memory = human_bytes(process["rss_bytes"])
        rows.append((one_line(process["name"], MAX_NAME_CHARS), str(process["pid"]), cpu, memory))
    return rows


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole if whole else 100} %"


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
