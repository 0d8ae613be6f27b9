# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet run`: a round without a database, with real backups; kills, hostile names, and ssh's part."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import LIMIT_S
from vmapipe.control.cli.fleet import main
from vmapipe.fleet import rounds
from vmapipe.fleet.carrier import agent_words, call, probe
from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.configuration import load, parse
from vmapipe.fleet.inventory import FleetHost
from vmapipe.fleet.records import ArchiveRecord, MachineRecord, Record, RunRecord
from vmapipe.fleet.rounds import Round
from vmapipe.fleet.scan import put_together, scan
from vmapipe.fleet.sqlite_file import open_file
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

HOSTILE = "we b'$(touch pwned);\n--yes"
MIB = 1 << 20


class Site:
    """A folder with disks at rest, a target, and a fleet.toml of three local hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "b"
        self.target.mkdir()
        for host, names in {"pve1": ["db"], "pve2": [HOSTILE], "pve3": []}.items():
            (folder / host).mkdir()
            for name in names:
                (folder / host / f"{name}.raw").write_bytes(os.urandom(MIB) + bytes(MIB))
        self.write()

    def write(self, more: str = "", hosts: str = "") -> None:
        tables = "".join(
            f'[host.{h}]\nguests = ["disks:{self.folder}/{h}/*.raw"]\n{hosts}\n'
            for h in ("pve1", "pve2", "pve3")
        )
        (self.folder / "fleet.toml").write_text(
            f'[defaults]\ntarget = "b"\nkeep = {{ last = 2 }}\nverify_every = "7d"\n{more}\n{tables}'
            f'[target.b]\ndirectory = "{self.target}"\n'
        )

    def words(self, *words: str) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "vmapipe.control.main", "fleet", *words),
            *("--file", str(self.folder / "fleet.toml")),
            *("--catalogue", str(self.folder / "fleet.db")),
        ]

    def fleet(
        self, *words: str, code: int = 0, limit_s: float = LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command: in this process, where it has no signals to hear."""
        argv = self.words(*words)
        if words[0] == "run":
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=limit_s, cwd=self.folder
            )
        else:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(io.StringIO()) as out,
                contextlib.redirect_stderr(io.StringIO()) as errors,
            ):
                got = main(argv[argv.index("fleet") + 1 :], "vmapipe fleet")
            done = subprocess.CompletedProcess(argv, got, out.getvalue(), errors.getvalue())
        assert done.returncode == code, done.stderr + done.stdout
        return done

    def catalogue(self) -> Catalogue:
        return open_file(str(self.folder / "fleet.db"))

    @property
    def archives(self) -> list[str]:
        return sorted(path.name for path in self.target.glob("*.vma*") if path.suffix != ".json")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_round_stores_verifies_and_prunes_every_machine_and_the_next_has_nothing_to_do(
    site: Site,
) -> None:
    assert "new: db" in site.fleet("scan").stdout
    assert site.fleet("check").stdout.startswith("FLEET OK - 2 machines")
    done = site.fleet("run")
    assert "6 jobs done, 0 failed" in done.stdout
    assert len(site.archives) == 2
    assert not (site.folder / "pwned").exists()
    catalogue = site.catalogue()
    archives = catalogue.select(ArchiveRecord)
    assert {a.machine for a in archives} == {"db", HOSTILE}
    assert all(Path(a.location).stat().st_size == a.size_bytes for a in archives)
    assert all(a.disk_bytes == 2 * MIB and a.transferred_bytes and a.uuid for a in archives)
    catalogue.close()
    assert "verify" in site.fleet("history", "--quiet", HOSTILE).stdout
    plan = [json.loads(line) for line in site.fleet("plan", "--json").stdout.splitlines()]
    assert {item["why"] for item in plan} == {"not-due"}
    (site.folder / "pve1" / "db.raw").rename(site.folder / "pve3" / "db2.raw")
    told = site.fleet("scan").stdout
    assert ("new: db2" in told, "vanished: db " in told) == (True, True)
    due = [json.loads(line) for line in site.fleet("due", "--json").stdout.splitlines()]
    assert [(item["host"], item["request"]["verb"]) for item in due] == [("pve3", "backup")]


def test_what_fails_and_a_host_that_does_not_answer_hold_nobody_up_and_are_told(
    site: Site,
) -> None:
    site.fleet("scan")
    (site.folder / "pve1" / "db.raw").write_bytes(b"")
    (site.folder / "pve3" / "web.raw").write_bytes(bytes(MIB))
    text = (site.folder / "fleet.toml").read_text()
    (site.folder / "fleet.toml").write_text(
        text.replace("[host.pve2]", '[host.pve2]\ncommand = ["/nowhere/vmapipe"]')
    )
    done = site.fleet("run", code=1)
    assert "host pve2 does not answer: cannot start /nowhere/vmapipe" in done.stderr
    assert "backup of db failed: " in done.stdout
    assert len(site.archives) == 1
    plan = [json.loads(line) for line in site.fleet("plan", "--json").stdout.splitlines()]
    reasons = {item["machine"]: item for item in plan if item["verb"] == "backup"}
    assert {name: item["why"] for name, item in reasons.items()} == {
        "db": "back-off",
        "web": "not-due",
        HOSTILE: "host-down",
    }
    assert reasons["db"]["until"] > time.time()
    checked = site.fleet("check", code=2).stdout
    assert checked.startswith(
        "FLEET CRITICAL - 3 machines, 1 never, 1 host-down: db no archive of it: "
    )
    assert "never=1;;;0" in checked


def test_rounds_that_are_cancelled_doubled_killed_and_ended_leave_nothing_behind(
    site: Site,
) -> None:
    """Of a killed one the jobs end though nobody tells them; the next does what was lost."""
    for disk in site.folder.glob("pve*/*.raw"):
        disk.unlink()
    for name in ("web", "mail"):
        (site.folder / "pve1" / f"{name}.raw").write_bytes(os.urandom(8 * MIB))
    # Slow, so that it is in the middle whenever we look.
    site.write('speed = "256K"')
    first = subprocess.Popen(site.words("run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        running = _until_running(site)
        assert running.machine in site.fleet("status").stdout
        assert "is told to end" in site.fleet("cancel", running.run).stdout
        other = site.fleet("run", code=1)
        assert "another `vmapipe fleet run` is at work" in other.stderr
        while not _runs(site, run=running.run, state="cancelled"):
            assert first.poll() is None
        second = _until_running(site)
        family = psutil.Process(first.pid).children(recursive=True)
        assert len(family) >= 2
    finally:
        first.kill()
        first.communicate()
    gone, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert (alive, len(gone)) == ([], len(family))
    again = subprocess.Popen(
        site.words("run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (third := _until_running(site)).planned_s > second.planned_s + 1:
        assert again.poll() is None
    again.send_signal(signal.SIGTERM)
    _, errors = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 143
    assert f"backup of {second.machine} was lost" in errors
    assert [run.run for run in _runs(site, state="running")] == []
    assert _runs(site, run=third.run)[0].state == "lost"
    assert os.listdir(site.target) == []


def test_a_catalogue_that_fails_meanwhile_ends_no_job_and_is_told_when_it_can_be(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a full disk: it can be read, and not be written to."""
    (site.folder / "fleet.toml").write_text(
        f'[defaults]\ntarget = "b"\n[host.a]\nguests = ["disks:{site.folder}/pve1/*.raw"]\n'
        f'[target.b]\ndirectory = "{site.target}"\n'
    )
    fleet, _ = load(str(site.folder / "fleet.toml"))
    catalogue = site.catalogue()
    found = scan(fleet, catalogue, probe, time.time())
    tries = iter(range(4))
    finish = catalogue.finish

    def full(run: RunRecord, *results: Record) -> bool:
        if next(tries, None) is not None:
            raise Failure("database or disk is full")
        return finish(run, *results)

    monkeypatch.setattr(catalogue, "finish", full)
    said = list[str]()
    cancel = Cancel()
    work = Round(fleet, catalogue, said.append, cancel)
    waits = work.run(found.machines, {}, 60)
    assert [run.state for run in work.ended] == ["done"]
    assert [wait.why for wait in waits] == ["not-due"]
    assert catalogue.standings()["db", "backup", "b"].archive == site.archives[0]

    monkeypatch.setattr(rounds, "_UNTOLD_S", 0.0)
    monkeypatch.setattr(catalogue, "standings", dict)
    tries = iter(range(10**6))
    with pytest.raises(Failure, match="disk is full"):
        Round(fleet, catalogue, said.append, cancel).run(found.machines, {}, 60)
    assert len(site.archives) == 2
    cancel.close()
    catalogue.close()


def _runs(site: Site, **equal: str) -> list[RunRecord]:
    catalogue = site.catalogue()
    found = catalogue.select(RunRecord, "", 0, **equal)
    catalogue.close()
    return found


def _until_running(site: Site) -> RunRecord:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := _runs(site, state="running", verb="backup"):
            return found[0]
        time.sleep(0.05)
    raise AssertionError("nothing runs")


# --- The agent, and what is between ---


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that does what the real one does with a command: a shell of "the far end" splits it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(
        "#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n"
        f'printf "%s\\n" "$@" > {tmp_path}/argv\n'
        'while [ "$1" != -- ]; do shift; done\n'
        '[ "$2" != root@gone ] || { echo "No route to host" >&2; exit 255; }\n'
        'exec sh -c "$3"\n'
    )
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "argv"


def test_through_ssh_a_command_line_is_always_the_same_and_names_are_not_in_it(
    site: Site, fake_ssh: Path
) -> None:
    words = (sys.executable, "-P", "-m", "vmapipe.control.main")
    host = FleetHost(
        "pve2", "root@pve2", guests=(f"disks:{site.folder}/pve2/*.raw",), command=words
    )
    answer, why = probe(host)
    assert (why, answer is not None) == ("", True)
    argv = fake_ssh.read_text()
    assert "-oBatchMode=yes" in argv
    assert "pwned" not in argv
    assert "pve2/" not in argv
    gone, why = probe(FleetHost("gone", "root@gone"))
    assert (gone, why) == (None, "ssh root@gone: No route to host")


def test_what_ssh_says_comes_in_one_line_without_its_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = "@" * 40
    script = f"printf '{frame}\\r\\n@  WARNING: IT HAS CHANGED!   @\\r\\n{frame}\\r\\nHost key verification failed.\\r\\n' >&2"
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert probe(FleetHost("pve1", ssh="root@pve1", guests=("libvirt",))) == (
        None,
        "ssh root@pve1: WARNING: IT HAS CHANGED! Host key verification failed.",
    )


def test_a_word_of_a_hosts_command_stays_one_word() -> None:
    host = FleetHost("a", "root@a", command=("/opt/my tools/vmapipe", "$(id)"))
    assert agent_words(host)[-1] == "'/opt/my tools/vmapipe' '$(id)' fleet agent"


def test_an_agent_refuses_what_is_not_listed_and_says_why() -> None:
    host = FleetHost("here")
    for request in ({"verb": "shell"}, {"verb": "probe", "rules": ["exec:id"]}, {}):
        events: list[object] = []
        ending = call(host, request, events.append, threading.Event())
        if request.get("verb") == "probe":
            assert "is not a way to find machines" in str(events)
        else:
            assert "a job has to be a JSON object with a verb" in ending.text
            assert (ending.code, events) == (2, [])


def test_an_agent_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\nexec cat >/dev/null\n")
    silent.chmod(0o755)
    host = FleetHost("here", command=(str(silent),))
    ending = call(host, {"verb": "probe"}, print, threading.Event(), silence_s=0.5)
    assert "it has said nothing for" in ending.text


def test_a_job_is_ended_at_its_time_limit(site: Site) -> None:
    (site.folder / "pve1" / "web.raw").write_bytes(os.urandom(16 * MIB))
    request = {
        "verb": "backup",
        "run": "r1",
        "limit_s": 2,
        "kind": "disks",
        "disk": f"{site.folder}/pve1/web.raw",
        "speed": "1M",
        "directory": str(site.target),
        "archive": "web-2026_01_01-00_00_00.vma",
    }
    events = list[dict[str, object]]()
    call(FleetHost("here"), request, lambda e: events.append(dict(e)), threading.Event())
    assert "time limit of 2 s" in str(events[-1]["text"])
    assert (events[-1]["event"], events[-1]["cancelled"]) == ("ended", False)
    assert site.archives == []


ODD: list[object] = [
    None,
    5,
    -1,
    1 << 70,
    1e999,
    float("nan"),
    "x" * 100_000,
    [],
    {},
    [[]],
    [{}],
    {"a": []},
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_whatever_a_host_answers_its_machines_are_understood_or_told(
    odd: Any, tmp_path: Path
) -> None:
    fleet, _ = parse(b'[host.a]\nguests = ["disks:/x"]\n')
    good = {"kind": "disks", "name": "web", "identity": "disk:/x", "source": {"disk": "/x"}}
    catalogue = open_file(str(tmp_path / "fleet.db"))
    fields = ("kind", "name", "identity", "source", "tags", "storages", "size_bytes", "state")
    answers: list[dict[str, Any]] = [{"machines": [{**good, name: odd}]} for name in fields]
    answers += [{"machines": odd}, {"machines": [odd]}, {"machines": [good], "notices": odd}]
    for answer in answers:
        found = put_together(fleet, catalogue, {"a": (answer, "")}, 1e9)
        assert len(found.machines) <= 2
        assert all(len(notice) < 3000 for notice in found.notices)
        catalogue.select(MachineRecord)
    catalogue.close()
