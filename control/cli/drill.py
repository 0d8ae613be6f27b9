# SPDX-License-Identifier: Apache-2.0
"""`vmapipe drill`: boot an archive and say whether it did."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import psutil

from vmapipe.access.archive import OpenArchive, open_for_access
from vmapipe.access.drill.plan import MAX_PLAN_BYTES, DrillPlan, parse_plan
from vmapipe.access.drill.result import (
    EVIDENCE_SUFFIX,
    DrillResult,
    encode_result,
    keep_evidence,
    write_metrics,
    write_result,
)
from vmapipe.access.drill.run import DrillOptions, Outcome, drill
from vmapipe.access.machine.libvirt import looks_like_libvirt, machine_of_libvirt
from vmapipe.access.machine.proxmox import config_without_one, machine_of_proxmox
from vmapipe.access.machine.spec import Limits, MachineSpec, Omission
from vmapipe.control.cli.caches import add_cache_options, caches_of
from vmapipe.control.cli.configuration import config_text, configuration_of
from vmapipe.control.cli.errors import naming
from vmapipe.control.cli.identity import (
    add_identity_option,
    add_signed_by_option,
    check_signed,
)
from vmapipe.control.coordinator.output_spec import is_path
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.crypt.magic import MAGIC, is_encrypted
from vmapipe.runtime.arguments import make_parser, size
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import EXIT_DAMAGED, Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.process import run
from vmapipe.runtime.side_files import read_awaited
from vmapipe.runtime.text import name_text, one_line

DESCRIPTION = """\
Boot the machine in an archive, and say whether it came up: the restore test. Nothing is restored,
nothing is written to the archive, and nothing of the machine is left. Its disks are read from the
archive, what it writes goes to nameless files; its network leads nowhere. The machine is made of the
configuration in the archive (Proxmox VE's, or libvirt's XML); what of it the test leaves out is
named. The strongest that answers is the proof: a command in the guest, the guest agent, a text on
the serial console, data from a TCP port, the screen. A picture is always taken.

The verdict is kept beside the archive, ARCHIVE.drill.json, with a picture and logs in ARCHIVE.drill/.
"""
EPILOG = """\
a plan says what has to answer (docs/operations/access.md):
  timeout = 300
  [[step]]
  kind = "command"                       # or agent, serial, tcp, screen
  run = ["/usr/bin/systemctl", "is-active", "postgresql"]
  output = "^active"

examples:
  vmapipe drill vm.vma.zst
  vmapipe drill vm.vma.zst --plan web.toml --metrics /var/lib/prometheus/node-exporter/web.prom
  vmapipe drill vm.vma --config vm.xml --memory 1G --keep evidence/

exit codes: 0 it has booted, 1 the test could not be made, or is undecided, 2 wrong use,
4 it has not booted, 130/143 ended by a signal
"""
# A server's firmware, kernel and services come up with that; what a test takes from the host
# has to be free there.
_USUAL_MEMORY_BYTES = 4 << 30
_USUAL_CPUS = 4
_LEAST_MEMORY_BYTES = 64 << 20
# A boot writes logs and caches, some hundred MiB; Windows' paging file is 8 GiB at the most.
_SCRATCH_BYTES = 16 << 30
_MAX_TIMEOUT_S = 24 * 3600


_NOT_BESIDE = "picture and logs are not kept beside an encrypted archive: --keep DIR keeps them"


class NotBooted(Failure):
    """The machine in the archive does not boot."""

    exit_code = EXIT_DAMAGED


def main(argv: Sequence[str], prog: str) -> int:
    parser = _parser(prog)
    options = parser.parse_args(argv)
    return run(prog, lambda: _drill(options))


def drill_stored(archive: str, plan: str | None, cancel: Cancel, emit: Emit) -> None:
    """Test an archive that has just been stored. Raises NotBooted, Failure, Cancelled."""
    words = [f"--plan={plan}"] if plan else []
    options = _parser("vmapipe drill").parse_args([*words, "--", archive])
    judge_archive(archive, options, cancel, emit)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument("--plan", metavar="FILE", help="what has to answer, as TOML")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the machine's configuration, instead of the archive's: a qemu-server.conf or "
        "a libvirt domain's XML",
    )
    parser.add_argument(
        "--timeout",
        type=_timeout,
        default=0.0,
        metavar="SECONDS",
        help="how long it may take to boot (default: the plan's, or 120 with KVM, 600 without)",
    )
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="the most that the machine may have (default: 4G, or half of what is free here)",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        metavar="N",
        help="the most processors that the machine may have (default: 4, or those of this host)",
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="boot a machine whose memory is in the archive (--state), too, instead of letting it go on",
    )
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--keep",
        metavar="DIR",
        help="the folder for picture and logs (default: ARCHIVE.drill beside the archive)",
    )
    group.add_argument(
        "--metrics", metavar="FILE", help="write the verdict for Prometheus' node_exporter"
    )
    group.add_argument(
        "--scratch",
        metavar="DIR",
        default="",
        help="where the machine's writes are kept meanwhile (default: $TMPDIR)",
    )
    group.add_argument(
        "--scratch-size",
        type=size,
        default=_SCRATCH_BYTES,
        metavar="SIZE",
        help="how much the machine may write (default: 16G)",
    )
    add_cache_options(parser)
    add_identity_option(parser)
    add_signed_by_option(parser)
    add_report_options(parser)
    parser.add_argument(
        "archive", metavar="ARCHIVE", help="a file, a block device, s3://BUCKET/KEY"
    )
    return parser


def _timeout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= _MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds from 1 to {_MAX_TIMEOUT_S}"
        )
    return value


def _drill(options: argparse.Namespace) -> None:
    cancel = Cancel()
    cancel.on_signals()
    with renderer("drill", options, sys.stdout) as emit:
        judge_archive(options.archive, options, cancel, emit)


def judge_archive(
    name: str, options: argparse.Namespace, cancel: Cancel, emit: Emit
) -> DrillResult:
    """Test an archive, report and keep the verdict. Raises NotBooted, Failure, Cancelled.

    `options`: of this command.
    """
    plan = _plan(options.plan, cancel)
    limits = _limits(options)

    def report(text: str) -> None:
        emit({"event": "notice", "text": text})

    with contextlib.ExitStack() as stack:
        with naming(name):
            caches = caches_of(options)  # a wrong key is told before anything is read
            check_signed(name, options, cancel, emit)
            archive = open_for_access(name, cancel, report, caches)
        stack.callback(archive.close)
        with naming(name):
            spec = _machine(archive, options.config, limits, cancel)
        scratch = stack.enter_context(OwnFolder("drill", options.scratch))
        wishes = DrillOptions(plan, options.timeout, options.scratch_size, not options.no_resume)
        outcome = drill(archive, spec, wishes, scratch, cancel, emit)
        hides = _is_file(name) and _is_encrypted_file(name)
    return _conclude(name, outcome, options, emit, hides=hides)


def _plan(path: str | None, cancel: Cancel) -> DrillPlan | None:
    if path is None:
        return None
    try:
        raw = read_awaited(path, MAX_PLAN_BYTES + 1, cancel)
    except OSError as error:
        raise Failure(f"cannot read the plan {path}: {os_error_text(error)}") from error
    with naming(path):
        return parse_plan(raw)


def _limits(options: argparse.Namespace) -> Limits:
    """Return what the machine may have. Raises UsageError."""
    memory_bytes = options.memory
    if memory_bytes is None:
        memory_bytes = min(_USUAL_MEMORY_BYTES, psutil.virtual_memory().available // 2)
        memory_bytes = max(_LEAST_MEMORY_BYTES, memory_bytes)
    if memory_bytes < _LEAST_MEMORY_BYTES:
        raise UsageError("--memory: a machine needs 64M at least")
    cpus = options.cpus
    if cpus is None:
        cpus = min(_USUAL_CPUS, len(os.sched_getaffinity(0)))
    if not 1 <= cpus <= 255:
        raise UsageError("--cpus: use 1 to 255")
    return Limits(memory_bytes >> 20 << 20, cpus)


def _machine(archive: OpenArchive, path: str | None, limits: Limits, cancel: Cancel) -> MachineSpec:
    """Return the machine to test. Raises MachineConfigError, Failure, Cancelled."""
    header = archive.header
    devices = [device.name for device in header.devices if not device.is_vmstate]
    if not devices:
        raise Failure("there is no disk in it that could boot")
    twins = sorted({name for name in devices if devices.count(name) > 1})
    if twins:
        raise Failure(
            f"two disks have the name {name_text(twins[0])}: which of them the machine had is not known"
        )
    raw = configuration_of(header, path, cancel)
    if looks_like_libvirt(raw):
        return machine_of_libvirt(raw, devices, limits)
    if raw:
        return machine_of_proxmox(config_text(raw), devices, limits)
    spec = machine_of_proxmox(config_without_one(devices), devices, limits)
    note = "the archive has none: any machine is tried; --config FILE says which it is"
    return spec._replace(omissions=(Omission("configuration", note), *spec.omissions))


def _without_words(result: DrillResult) -> DrillResult:
    """What machine, screen and guest have said is not in it."""
    return result._replace(reason="", steps=(), left_out=(), evidence="")


def _is_encrypted_file(name: str) -> bool:
    with open(name, "rb") as file:
        return is_encrypted(file.read(len(MAGIC)))


def _is_file(name: str) -> bool:
    return is_path(name) and not is_object(name) and os.path.isfile(name)


def _conclude(
    name: str, outcome: Outcome, options: argparse.Namespace, emit: Emit, *, hides: bool
) -> DrillResult:
    """Keep what there is and tell the verdict. Raises NotBooted, Failure.

    `hides`: the archive is encrypted. Beside it only the verdict is kept: a screen and a log show what it hides.
    """
    result = outcome.result
    is_file = _is_file(name)
    folder = options.keep
    if folder is None and is_file and not hides:
        folder = f"{os.path.abspath(name)}{EVIDENCE_SUFFIX}"
    troubles = [_NOT_BESIDE] if folder is None and hides else []
    if folder is not None:
        beside = os.path.dirname(os.path.abspath(folder)) == os.path.dirname(os.path.abspath(name))
        if beside:
            result = result._replace(evidence=os.path.basename(os.path.abspath(folder)))
        try:
            keep_evidence(folder, {**outcome.files, "result.json": encode_result(result)})
        except Failure as error:
            troubles.append(str(error))
            result, folder = result._replace(evidence=""), None
    try:
        if is_file:
            write_result(os.path.abspath(name), _without_words(result) if hides else result)
        else:
            troubles.append("the result is not kept: the archive is not a file of this host")
    except Failure as error:
        troubles.append(str(error))
    try:
        if options.metrics:
            write_metrics(options.metrics, result)
    except Failure as error:
        troubles.append(str(error))
    for text in troubles:
        emit({"event": "notice", "text": text})
    emit(
        {
            "event": "drilled",
            "archive": name,
            "uuid": result.archive_uuid,
            "verdict": result.verdict,
            "reason": result.reason,
            "seconds": result.seconds,
            "proof": result.proof,
            "steps": [step._asdict() for step in result.steps],  # type: ignore[misc]
            "resumed": result.is_resumed,
            "bytes_read": result.bytes_read,
            "evidence": folder,
        }
    )
    if result.verdict == "not booted":
        raise NotBooted(f"{one_line(name)} does not boot: {result.reason}")
    if result.verdict == "undecided":
        raise Failure(f"{one_line(name)}: undecided whether it boots: {result.reason}")
    return result
