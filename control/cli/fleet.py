# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet`: every machine of every host backed up and tested, within limits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmapipe.control.cli.report import add_report_options
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.process import run
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.fleet.catalogue import Catalogue
    from vmapipe.fleet.inventory import Fleet
    from vmapipe.fleet.planner import FleetPlan
    from vmapipe.fleet.scan import Scan

DESCRIPTION = """\
Back up and test every machine of every host, within limits, and say which is not safe.
What is promised to each is in /etc/vmapipe/fleet.toml (docs/operations/fleet.md).

  scan             find the machines of all hosts; say which are new, gone or moved
  plan             say what would start now, and of all others why not
  run              one round: do what is due, by subprocesses and ssh, then end (cron)
  status           what runs and waits, with rates
  cancel JOB       end a running job; it is due again later
  history MACHINE  what was done with a machine
  check            as a Nagios plugin: is any machine late, untested, damaged?
  report           say of every machine whether it is safe, as a page (--html), JSON, metrics
  rescan           make the catalogue of archives again from the archives themselves
  due              what may start now, for another scheduler (--json)
  serve            stay, and have workers do what is due (PostgreSQL)
  worker           stay on one host, and do its jobs
"""

EPILOG = """\
examples:
  vmapipe fleet scan
  vmapipe fleet plan
  vmapipe fleet run
  vmapipe fleet check
  vmapipe fleet history web
  vmapipe fleet serve --state /var/lib/vmapipe/fleet
  vmapipe fleet worker --host pve1 --database postgresql://vmapipe@b1/fleet

exit codes: 0 done, 1 a job failed or a host did not answer, 2 wrong use, 130/143 ended by a signal;
of check: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN; of report: 4 a machine is not safe
"""

STATE = "/var/lib/vmapipe/fleet"
FILE = "/etc/vmapipe/fleet.toml"
_RUN_S = 12 * 3600
_UNKNOWN = 3


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "action", choices=tuple(_ACTIONS), metavar="ACTION", help="one of the words above"
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="of cancel a job, of history a machine"
    )
    parser.add_argument(
        "--file",
        default=os.environ.get("VMAPIPE_FLEET", FILE),
        metavar="FLEET.toml",
        help=f"what is promised to which machines (default: $VMAPIPE_FLEET, or {FILE})",
    )
    parser.add_argument(
        "--inventory",
        metavar="FILE",
        help="hosts of this Ansible inventory, too (INI, YAML, or ansible-inventory --list)",
    )
    parser.add_argument(
        "--catalogue",
        metavar="FILE",
        help="where it is noted what was found and done (default: the file's, or "
        "/var/lib/vmapipe/fleet.db)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: an object, or one a line")
    parser.add_argument("--quiet", action="store_true", help="say nothing but what failed")
    group = parser.add_argument_group("plan, due and run")
    group.add_argument(
        "--no-scan",
        action="store_true",
        help="plan and due: do not ask the hosts, but take what the last scan has found",
    )
    group.add_argument(
        "--time",
        type=int,
        default=_RUN_S,
        metavar="SECONDS",
        help="run: start nothing later than that after its begin (default: %(default)s)",
    )
    group = parser.add_argument_group("serve and worker, and to look at what they do")
    group.add_argument(
        "--database",
        metavar="DSN",
        help="postgresql://USER@HOST/NAME (default: the file's; serve alone starts a PostgreSQL of "
        "its own)",
    )
    group.add_argument(
        "--state",
        default="",
        metavar="DIR",
        help=f"without --database: the folder of the PostgreSQL that serve starts (default: {STATE})",
    )
    group.add_argument("--host", metavar="NAME", help="worker: which of the file's hosts this is")
    add_report_options(parser)
    return parser


def main(argv: Sequence[str], prog: str) -> int:
    parser = _parser(prog)
    # A name may stand behind options, too.
    options = parser.parse_intermixed_args(argv)
    if options.action in ("cancel", "history") and not options.name:
        parser.error(f"{options.action} needs a name")
    code = [0]

    def work() -> None:
        code[0] = _ACTIONS[options.action](options)

    if options.action == "check":
        return _as_plugin(work, code)
    return run(prog, work) or code[0]


def _as_plugin(work: Callable[[], None], code: list[int]) -> int:
    """A plugin that cannot tell says UNKNOWN, whatever the reason."""
    try:
        work()
    except Failure as failure:
        print(one_line(f"FLEET UNKNOWN - {failure}".replace("|", "/")))
        return _UNKNOWN
    return code[0]


# --- What all need ---


def _fleet(options: argparse.Namespace) -> Fleet:
    from vmapipe.fleet.ansible import read_hosts
    from vmapipe.fleet.configuration import ConfigurationMistakes, check_references, load
    from vmapipe.fleet.inventory import FleetHost

    try:
        fleet, source = load(options.file)
        hosts = dict(fleet.hosts)
        sources = [(source.inventory, source.group, source.host)] if source else []
        if options.inventory:
            sources.append((options.inventory, "all", source.host if source else {}))
        for path, group, values in sources:
            for found in read_hosts(path, group):
                # What fleet.toml itself says of a host goes before its inventory.
                hosts.setdefault(found.name, FleetHost(found.name, ssh=found.ssh, **values))
        fleet = dataclasses.replace(fleet, hosts=hosts)
        check_references(fleet, options.file)
    except ConfigurationMistakes as mistakes:
        for line in mistakes.lines[1:]:
            print(one_line(f"vmapipe fleet: {line}"), file=sys.stderr)
        raise
    return fleet


def _catalogue_path(options: argparse.Namespace, fleet: Fleet) -> str:
    if options.catalogue or fleet.catalogue:
        return str(options.catalogue or fleet.catalogue)
    if os.geteuid() == 0:
        return "/var/lib/vmapipe/fleet.db"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{home}/vmapipe/fleet.db"


def _dsn(options: argparse.Namespace, fleet: Fleet) -> str:
    """The database that is asked for; empty: none is, and the catalogue is a file."""
    if options.database or fleet.database:
        return str(options.database or fleet.database)
    if options.state or options.action == "worker":
        from vmapipe.fleet.postgres import private_dsn

        return private_dsn(options.state or STATE)
    return ""


@contextlib.contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[Fleet, Catalogue]]:
    """The fleet and its catalogue: of the database where there is one, else the file."""
    from vmapipe.fleet.sqlite_file import open_file

    fleet = _fleet(options)
    catalogue: Catalogue
    if dsn := _dsn(options, fleet):
        from vmapipe.fleet.engine import open_database

        catalogue = open_database(dsn)
    else:
        catalogue = open_file(_catalogue_path(options, fleet))
    try:
        yield fleet, catalogue
    finally:
        catalogue.close()


def _look(fleet: Fleet, catalogue: Catalogue) -> Scan:
    from vmapipe.fleet.carrier import probe
    from vmapipe.fleet.records import HostRecord
    from vmapipe.fleet.scan import scan

    now = time.time()
    found = scan(fleet, catalogue, probe, now)
    catalogue.put(*(HostRecord(name, now, 0, found.down.get(name, "")) for name in fleet.hosts))
    return found


def _say(text: str) -> None:
    print(one_line(text), flush=True)


def _warn(text: str) -> None:
    print(one_line(f"vmapipe fleet: {text}"), file=sys.stderr, flush=True)


def _tell_scan(found: Scan, *, quiet: bool) -> None:
    for host, why in sorted(found.down.items()):
        _warn(f"host {host} does not answer: {why}")
    for notice in found.notices:
        _warn(notice)
    if quiet:
        return
    for name in sorted(found.new):
        _say(f"new: {name}")
    for name in sorted(found.vanished):
        _say(f"vanished: {name} (its archives stay)")
    for words in sorted(found.moved):
        _say(f"moved: {words}")


# --- Actions ---


def _scan(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_views import show_table

    with _opened(options) as (fleet, catalogue):
        found = _look(fleet, catalogue)
        if options.json:
            machines = [dataclasses.asdict(m) | {"source": dict(m.source)} for m in found.machines]
            whole = dataclasses.asdict(found) | {"machines": machines}
            print(json.dumps(whole), flush=True)
            return int(bool(found.down))
        _tell_scan(found, quiet=options.quiet)
        if not options.quiet:
            rows = [("MACHINE", "HOST", "STATE", "TAGS", "STORAGES")]
            rows += [
                (m.name, m.host, m.state, ",".join(m.tags), ",".join(m.storages))
                for m in sorted(found.machines, key=lambda m: m.name)
            ]
            show_table(rows)
            _say(f"{len(found.machines)} machines on {len(fleet.hosts)} hosts")
            for rule in fleet.unused_rules(found.machines):
                _warn(f"[vm.{json.dumps(rule.pattern)}] of {options.file} fits none of them")
        return int(bool(found.down))


def _planned(
    options: argparse.Namespace, fleet: Fleet, catalogue: Catalogue
) -> tuple[FleetPlan, Sequence[Any]]:
    from vmapipe.fleet.planner import plan
    from vmapipe.fleet.records import HostRecord
    from vmapipe.fleet.scan import known_machines

    if options.no_scan or _dsn(options, fleet):
        machines = known_machines(catalogue)
        down = {h.host: h.down for h in catalogue.select(HostRecord) if h.down}
    else:
        found = _look(fleet, catalogue)
        _tell_scan(found, quiet=options.json or options.quiet)
        machines, down = found.machines, found.down
    now = time.time()
    standings, running = catalogue.standings(), catalogue.running()
    return plan(fleet, machines, standings, running, down, now), machines


def _plan(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_views import show_plan

    with _opened(options) as (fleet, catalogue):
        found, _ = _planned(options, fleet, catalogue)
        show_plan(found, as_json=options.json)
    return 0


def _due(options: argparse.Namespace) -> int:
    from vmapipe.fleet.jobs import request_of
    from vmapipe.fleet.outcome import location_in, new_run

    with _opened(options) as (fleet, catalogue):
        found, machines = _planned(options, fleet, catalogue)
        by_name = {machine.name: machine for machine in machines}
        now = time.time()
        for task in found.starts:
            run_record = new_run(task, task.archive, now)
            machine = by_name[task.machine]
            location = location_in(catalogue, fleet, task, machine)
            try:
                request = request_of(fleet, task, machine, location, run_record.run, now)
            except UsageError as error:
                _warn(f"{task.verb} of {task.machine}: {error}")
                continue
            if options.json:
                print(json.dumps({"host": task.host, "machine": task.machine, "request": request}))
            else:
                _say(f"{task.verb} of {task.machine} on {task.host}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from vmapipe.fleet.rounds import Round, lose_all, only_one

    fleet = _fleet(options)
    if _dsn(options, fleet):
        raise UsageError("run needs no database: `fleet serve` does the work where there is one")
    cancel = Cancel()
    cancel.on_signals()
    path = _catalogue_path(options, fleet)
    with (
        _opened(options) as (fleet, catalogue),
        only_one(f"{path}.lock", "another `vmapipe fleet run` is at work"),
    ):
        for lost in lose_all(catalogue, time.time()):
            _warn(f"{lost.verb} of {lost.machine} was lost with an earlier run, and is due again")
        found = _look(fleet, catalogue)
        _tell_scan(found, quiet=options.quiet or options.json)
        say = (lambda text: None) if options.quiet or options.json else _say
        work = Round(fleet, catalogue, say, cancel)
        try:
            waits = work.run(found.machines, found.down, options.time)
        finally:
            if options.json:
                for record in work.ended:
                    print(json.dumps(dataclasses.asdict(record)), flush=True)
        failed = [record for record in work.ended if record.state != "done"]
        if not options.json:
            for record in failed if options.quiet else []:
                _warn(f"{record.verb} of {record.machine}: {record.text or record.state}")
            held = sum(wait.why not in ("not-due", "skipped", "no-archive") for wait in waits)
            done = len(work.ended) - len(failed)
            say(f"{done} jobs done, {len(failed)} failed, {held} wait (vmapipe fleet plan)")
        for refused in work.refused:
            _warn(f"{refused.task.verb} of {refused.task.machine} cannot start: {refused.text}")
        return int(bool(failed or found.down or work.refused))


def _status(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_views import show_running

    with _opened(options) as (_, catalogue):
        show_running(catalogue, as_json=options.json)
    return 0


def _history(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_views import show_history

    with _opened(options) as (_, catalogue):
        show_history(catalogue, options.name, as_json=options.json)
    return 0


def _check(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_report import show_check

    with _opened(options) as (fleet, catalogue):
        return show_check(fleet, catalogue, as_json=options.json)


def _report(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_report import report

    with _opened(options) as (fleet, catalogue):
        report(fleet, catalogue, options)
    return 0


def _rescan(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_report import rescan

    with _opened(options) as (fleet, catalogue):
        count, lines = rescan(fleet, catalogue)
    for line in lines:
        _warn(line)
    if not options.quiet:
        _say(f"{count} archives in {len(fleet.targets) - len(lines)} targets")
    return int(bool(lines))


def _cancel(options: argparse.Namespace) -> int:
    from vmapipe.fleet.records import CancelRecord

    with _opened(options) as (_, catalogue):
        runs = catalogue.running()
        fits = [r for r in runs if r.run.startswith(options.name) or r.machine == options.name]
        if len(fits) != 1:
            known = ", ".join(f"{r.run} ({r.machine})" for r in fits or runs) or "none at all"
            what = "may be any of" if fits else "is not a running job; there is"
            raise Failure(f"{options.name!r} {what} {known}")
        catalogue.put(CancelRecord(fits[0].run, time.time()))
        _say(f"{fits[0].run}: {fits[0].verb} of {fits[0].machine} is told to end")
    return 0


# --- For hosts ---


def _agent(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_hosts import agent

    del options
    return agent()


def _probe(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_hosts import probe

    return probe(options.name or "")


def _serve(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_hosts import serve

    fleet = _fleet(options)
    return serve(fleet, options.database or fleet.database, options.state or STATE, _say)


def _worker(options: argparse.Namespace) -> int:
    from vmapipe.control.cli.fleet_hosts import work

    fleet = _fleet(options)
    return work(fleet, options.host or "", _dsn(options, fleet), _say)


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "scan": _scan,
    "plan": _plan,
    "run": _run,
    "status": _status,
    "cancel": _cancel,
    "history": _history,
    "check": _check,
    "report": _report,
    "rescan": _rescan,
    "due": _due,
    "serve": _serve,
    "worker": _worker,
    # For hosts, not for people.
    "agent": _agent,
    "probe": _probe,
}
