# SPDX-License-Identifier: Apache-2.0
"""Ten hosts in network namespaces and 200 machines, while whatever can die does: nothing is lost, doubled, left, or too much."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fleet.namespaces import STORE, NamespaceFleet, Observer, namespace_fleet
from tests.machine import LIMIT_S, Need, good

LIMITS = {"total": 6, "host": 2, "target": 5}
# Each machine takes some seconds, mostly asleep: a kill meets work, and the machine stays usable.
DEFAULTS = """\
every = "45m"
speed = "64K"
[vm."vm?"]
keep = { last = 2 }
verify_every = "20m"
"""


_TRY_ENDS = """
for host in b1 pve1 pve2 pve3 lan; do ip netns pids try-$host | xargs -r kill -9; ip netns del try-$host; done
"""


def until(true: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def disturb(site: NamespaceFleet, chance: random.Random) -> str:
    """Do one thing that nobody wants; return what it was."""
    host = chance.choice(site.hosts)
    pause_s = chance.uniform(0, 6)
    match chance.choice(
        ["worker"] * 6
        + ["serve"] * 2
        + ["postgres"] * 2
        + ["host"] * 3
        + ["cable"] * 3
        + ["move"] * 3
        + ["archiver", "store"]
    ):
        case "worker":
            site.kill(host, "worker")
            time.sleep(pause_s)
            site.start(host, "worker")
            return f"worker of {host}"
        case "serve" | "archiver" as what:
            site.kill(STORE, what)
            time.sleep(pause_s)
            site.start(STORE, what)
            return what
        case "postgres":
            site.kill_postgres()
            return "postgres"
        case "cable":
            site.network.plug(host, "down")
            time.sleep(seconds := chance.choice([2, 15, 45]))
            site.network.plug(host, "up")
            return f"cable of {host}, {seconds} s"
        case "move":
            # Where it is in the middle of a backup, rather.
            rows = site.ask("SELECT machine FROM runs WHERE state = 'running' AND verb = 'backup'")
            name = rows[0][0] if rows else chance.choice(list(site.where))
            if name in site.where:
                site.move(name, chance.choice([h for h in site.hosts if h != site.where[name]]))
            return f"move of {name} to {site.where[name]}"
        case what:
            failed = STORE if what == "store" else host
            site.fail_host(failed)
            time.sleep(pause_s)
            site.network.add(failed)
            site.start_host(failed)
            return f"host {failed}"


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_an_hour_of_kills_on_ten_hosts_costs_no_machine_and_exceeds_no_limit(
    short_folder: Path, tmp_path: Path, need: Need
) -> None:
    """VMAPIPE_SOAK_S: how long, an hour by default. Then all that is due is done within some minutes.

    VMAPIPE_SOAK_MACHINES: how many, 200 by default: fewer reach the last checks sooner. Logs, and what the observer has seen, stay in the test's own folder.
    """
    chance = random.Random(os.environ.get("VMAPIPE_SOAK_SEED", "20"))
    seconds = float(os.environ.get("VMAPIPE_SOAK_S", "3600"))
    machines = int(os.environ.get("VMAPIPE_SOAK_MACHINES", "200"))
    with namespace_fleet(
        need, short_folder, hosts=10, machines=machines, limits=LIMITS, defaults=DEFAULTS
    ) as site:
        # The archives' host is right, and the database with it; the others are not.
        site.clocks = {host: 120.0 * n - 600 for n, host in enumerate(site.hosts)}
        for host in (STORE, *site.hosts):
            site.start_host(host)
        began = time.monotonic()
        lose_at = began + seconds / 2
        with (
            _kept(short_folder / "log", tmp_path / "kept"),
            Observer(site) as observer,
            (short_folder / "log" / "disturbed").open("w") as log,
        ):
            while time.monotonic() < began + seconds:
                time.sleep(chance.uniform(3, 20))
                told = disturb(site, chance)
                if time.monotonic() > lose_at:
                    lose_at = float("inf")
                    _lose_the_database(site)
                    told += "; and the database was lost"
                print(f"{time.time():.0f} {told}", file=log, flush=True)
            at_s = time.time()
            # All are due again, as if their time had come.
            until(lambda: bool(site.ask("DELETE FROM standings WHERE verb = 'backup' RETURNING 1")))
            until(lambda: set(site.stored(at_s)) == set(site.where), 1800)
            until(lambda: site.ask("SELECT count(*) FROM runs WHERE ended_s = 0") == [["0"]], 600)
            _is_tidy(site)
        assert observer.trouble == []
        # It was at the limits, and they held.
        assert observer.most["target"] == LIMITS["target"]


@contextlib.contextmanager
def _kept(folder: Path, to: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.copytree(folder, to)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_do_as_they_stand_what_it_says(tmp_path: Path, need: Need) -> None:
    """In an empty home, with nothing but vmapipe and Debian's programs."""
    need("ip")
    page = Path(__file__).parent.parent.parent / "docs" / "operations" / "fleet.md"
    first = page.read_text().partition("\n## fleet.toml")[0]
    blocks = re.findall(r"^```\n(.*?)^```", first, re.MULTILINE | re.DOTALL)
    script = "".join(block for block in blocks if not block.startswith("restrict,"))
    home, programs = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    (programs / "vmapipe").symlink_to(Path(sys.executable).parent / "vmapipe")
    path = f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            env={"HOME": str(home), "PATH": path},
            capture_output=True,
            text=True,
            timeout=500,
        )
    finally:
        # What its last lines do, should it not have come so far.
        subprocess.run(["bash", "-c", _TRY_ENDS], capture_output=True)
    said = done.stdout + done.stderr
    told = iter(done.stdout.splitlines())
    for words in (
        "4 machines on 3 hosts",
        "backup of web done",
        "12 jobs done, 0 failed, 0 wait",
        "FLEET OK - 4 machines, all as promised",
        "backup of mail failed: tcp://10.99.0.1:7777: cannot be reached",
        "9 jobs done, 1 failed, 1 wait",
        "back-off: it failed once: tcp://10.99.0.1:7777",
        "FLEET CRITICAL - 4 machines, 1 never: mail no archive of it",
    ):
        assert any(words in line for line in told), (words, said)
    errors = done.stderr.splitlines()
    assert errors == ["vmapipe fleet: 1 of 4 machines is not safe"], said
    assert list(home.iterdir()) == []
    assert "try-" not in subprocess.check_output(["ip", "netns"], text=True)


def _lose_the_database(site: NamespaceFleet) -> None:
    before = site.stored()
    site.lose_database()
    until(lambda: site.command("rescan").returncode == 0, 300)
    until(lambda: int(site.ask("SELECT count(*) FROM archives")[0][0]) >= len(before))


def _is_tidy(site: NamespaceFleet) -> None:
    until(lambda: site.ask("SELECT count(*) FROM procrastinate_jobs") == [["0"]])
    # The server's, and one a worker.
    assert site.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [
        [str(2 + len(site.hosts))]
    ]
    assert site.left_in_machines() == []
    assert list(site.store.glob(".*")) == []
    site.stop()
    until(lambda: site.left() == [])
    assert "Traceback" not in site.logs()
    for name in list(site.where)[:20]:
        newest = max(site.store.glob(f"{name}-*.vma.zst"))
        good("verify", "--quiet", "--require-manifest", newest)
