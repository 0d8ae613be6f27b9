# SPDX-License-Identifier: Apache-2.0
"""Jobs as they travel: a verb and its JSON arguments, checked by the host that runs them. Pure.

Nobody can send code: a verb is one of five, each argument is listed here with what it may be, and the
command that comes of them is one of vmapipe's own without a shell. No argument may be `exec:` or `fd:`.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmapipe.fleet.inventory import Fleet, FleetMachine, FleetTarget, Policy
from vmapipe.fleet.planner import FleetTask
from vmapipe.fleet.records import VERBS
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text

#: A request is one line; far above any.
MOST_REQUEST_BYTES = 1 << 20

Request = Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,199}")
_PLACE = re.compile(r"/[^\0]{0,4000}|s3://[a-z0-9][^\0\n]{0,1000}")
_PATH = re.compile(r"/[^\0]{0,4000}")
_RULES = frozenset({"last", "hourly", "daily", "weekly", "monthly", "yearly"})


def _text(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: value in words


def _count(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(_PATH.fullmatch(value)) and "/../" not in f"{value}/"


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and bool(_PLACE.fullmatch(value)) and "/../" not in f"{value}/"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value)) and ".." not in value


def _is_keep(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= _RULES
        and all(type(n) is int and 0 <= n <= 10**6 for n in value.values())
    )


def _are_disks(value: Any) -> bool:
    """Names of disks; a dash at the begin would be an option."""
    return isinstance(value, list) and all(
        isinstance(word, str) and bool(re.fullmatch(r"[A-Za-z0-9_#][^\0\n=,]{0,199}", word))
        for word in value
    )


def _is_disk(value: Any) -> bool:
    # A comma would begin an option of --disk.
    return _is_path(value) and "," not in value


_RATE = _text(r"[0-9]{1,12}(?:\.[0-9]+)?[KMGT]?")
_LIMIT = _count(1, 30 * 86400)
_COMMON = {"verb": _one_of(*VERBS), "run": _text(r"[A-Za-z0-9_.-]{1,64}"), "limit_s": _LIMIT}
_LOAD = {
    "nice": _count(-20, 19),
    "ionice": _text(r"idle|best-effort:[0-7]"),
}
_NEEDED: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "backup": {**_COMMON, "kind": _one_of("qmp", "libvirt", "proxmox", "disks")},
    "verify": {**_COMMON, "archive": _is_place},
    "drill": {**_COMMON, "archive": _is_place},
    "copy": {**_COMMON, "archive": _is_place, "to": _is_place},
    "prune": {**_COMMON, "directory": _is_place, "group": _is_name, "keep": _is_keep},
}
_ALLOWED: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "backup": {
        **_LOAD,
        "socket": _is_path,
        "domain": _text(r"[A-Za-z0-9_.+][^\0\n]{0,199}"),
        "vmid": _count(100, 999_999_999),
        "disk": _is_disk,
        "disks": _are_disks,
        "archive": _is_name,
        "directory": _is_path,
        "s3": _text(r"s3://[a-z0-9][^\0\n]{0,1000}"),
        "archiver": _text(r"tcp://[^\s/]{1,255}:[0-9]{1,5}"),
        "keys": _is_path,
        "compress": _text(r"zstd(?::(?:[1-9]|1[0-9]))?"),
        "base": _one_of("auto"),
        "guest_latency": _text(r"[1-9][0-9]{0,4}(?:ms|s)"),
        "speed": _RATE,
        "freeze": lambda value: value is True,
    },
    "verify": _LOAD,
    "drill": {**_LOAD, "plan": _is_path, "timeout_s": _count(1, 86400)},
    "copy": _LOAD,
    "prune": {},
}


def check(request: object) -> Request:
    """Return a request that may be carried out. Raises UsageError that names what may not."""
    if not isinstance(request, dict) or request.get("verb") not in VERBS:
        raise UsageError(f"a job has to be a JSON object with a verb, one of {', '.join(VERBS)}")
    verb = request["verb"]
    needed, allowed = _NEEDED[verb], _ALLOWED[verb]
    for name, value in request.items():
        is_valid = needed.get(name) or allowed.get(name)
        if is_valid is None:
            raise UsageError(f"a {verb} job has no argument {name_text(str(name))}")
        if not is_valid(value):
            raise UsageError(f"a {verb} job's {name} may not be {name_text(repr(value))}")
    if missing := [name for name in needed if name not in request]:
        raise UsageError(f"a {verb} job needs {', '.join(missing)}")
    return request


# --- Commands ---


def command_of(request: Request) -> list[str]:
    """Return the words behind `vmapipe` for a checked request. Raises UsageError."""
    match request["verb"]:
        case "backup":
            return _backup(request)
        case "verify":
            return ["verify", "--json", "--require-manifest", request["archive"]]
        case "drill":
            words = ["drill", "--json"]
            words += _options(request, plan="--plan", timeout_s="--timeout")
            return [*words, request["archive"]]
        case "copy":
            return ["copy", "--json", request["archive"], request["to"]]
    keep = [f"--keep-{rule}={count}" for rule, count in sorted(request["keep"].items())]
    only = [f"--only={request['group']}"]
    return ["prune", "--yes", "--json", *keep, *only, request["directory"]]


def _options(request: Request, **names: str) -> list[str]:
    """Options with `=`, so that no value can be taken for an option of its own."""
    return [f"{option}={request[name]}" for name, option in names.items() if name in request]


def _backup(request: Request) -> list[str]:
    words = ["backup", "--json"]
    kind = request["kind"]
    needs = {"qmp": "socket", "libvirt": "domain", "proxmox": "vmid", "disks": "disk"}[kind]
    if needs not in request:
        raise UsageError(f"a backup job of kind {kind} needs {needs}")
    option = {"qmp": "--qmp", "libvirt": "--libvirt", "proxmox": "--pve", "disks": "--disk"}[kind]
    value = str(request[needs])
    if kind == "disks":
        # With a name before it, whatever the path has in it.
        value = f"{safe_name(os.path.basename(value))}={value}"
    words.append(f"{option}={value}")
    words += [f"--disk={disk}" for disk in request.get("disks", [])]
    words += _options(
        request,
        compress="--compress",
        base="--base",
        guest_latency="--guest-latency",
        speed="--speed",
        nice="--nice",
        ionice="--ionice",
    )
    words += ["--freeze"] if request.get("freeze") and kind == "libvirt" else []
    if kind == "proxmox":
        return [*words, _needed(request, "directory")]
    name = _needed(request, "archive")
    if "archiver" in request:
        return [*words, *_options(request, archiver="--archiver", keys="--keys"), name]
    if "s3" in request:
        return [*words, f"{request['s3']}/{name}"]
    return [*words, f"{_needed(request, 'directory')}/{name}"]


def _needed(request: Request, name: str) -> str:
    if name not in request:
        raise UsageError(f"this backup job needs {name}")
    return str(request[name])


# --- Requests ---


def safe_name(machine: str) -> str:
    """Return a machine's name as a part of a file's name; two machines never have the same."""
    if _NAME.fullmatch(machine) and ".." not in machine and len(machine) <= 100:
        return machine
    cleaned = re.sub(r"[^A-Za-z0-9_.+@-]", "_", machine)[:60].replace("..", "__")
    digest = hashlib.sha256(machine.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"m_{cleaned}_{digest}"


def archive_name(machine: str, compress: str, now_s: float) -> str:
    """Return the name of a new archive, with the time (UTC) that `vmapipe prune` reads."""
    stamp = time.strftime("%Y_%m_%d-%H_%M_%S", time.gmtime(now_s))
    return f"{safe_name(machine)}-{stamp}.vma{'.zst' if compress != 'none' else ''}"


def directory_of(target: FleetTarget, host: str) -> str:
    """Return the folder of a target for archives of this host's machines."""
    return target.directory.replace("{host}", host)


def location_of(target: FleetTarget, host: str, archive: str) -> str:
    """Return where an archive of a machine on `host` is, as the target's own host sees it."""
    if target.s3 and not target.directory:
        return f"{target.s3}/{archive}"
    return f"{directory_of(target, host)}/{archive}"


def request_of(
    fleet: Fleet, task: FleetTask, machine: FleetMachine, location: str, run: str, now_s: float
) -> dict[str, Any]:
    """Return the request of a planned task. `location`: where its archive is, for all but a backup.

    Raises UsageError where it cannot be.
    """
    policy = fleet.policy(machine)
    target = fleet.targets[task.target]
    request: dict[str, Any] = {
        "verb": task.verb,
        "run": run,
        "limit_s": int(min(policy.time_limit_s, 30 * 86400)),
    }
    if task.verb != "prune":
        request |= {"nice": policy.nice, "ionice": policy.ionice}
    match task.verb:
        case "backup":
            request |= _backup_request(policy, target, machine, now_s)
        case "verify":
            request["archive"] = location
        case "drill":
            request["archive"] = location
            if policy.drill:
                request["plan"] = policy.drill
        case "copy":
            request["archive"] = location
            # The folder first, as everywhere where a target has both.
            request["to"] = directory_of(target, machine.host) or target.s3
        case "prune":
            place = directory_of(target, machine.host) or target.s3
            if not place:
                raise UsageError(f"target {target.name} has no directory that could be pruned")
            request |= {
                "directory": place,
                "group": safe_name(machine.name),
                "keep": dict(target.keep or policy.keep),
            }
    return dict(check(request))


def _backup_request(
    policy: Policy, target: FleetTarget, machine: FleetMachine, now_s: float
) -> dict[str, Any]:
    source = dict(machine.source)
    request: dict[str, Any] = {"kind": machine.kind}
    request |= {k: source[k] for k in ("socket", "domain", "vmid", "disk") if k in source}
    if policy.speed:
        request["speed"] = policy.speed
    # Disks at rest have no guest whose requests could be slowed down.
    if policy.guest_latency and machine.kind != "disks":
        request["guest_latency"] = policy.guest_latency
    if policy.compress != "none":
        request["compress"] = policy.compress
    if policy.base == "auto":
        request["base"] = "auto"
    if policy.freeze:
        request["freeze"] = True
    if machine.kind in ("qmp", "libvirt") and (
        chosen := _chosen_disks(policy, machine, source.get("disks", []))
    ):
        request["disks"] = chosen
    if machine.kind != "proxmox":
        request["archive"] = archive_name(machine.name, policy.compress, now_s)
    if target.archiver:
        request |= {"archiver": target.archiver, "keys": target.keys}
    elif target.directory:
        request["directory"] = directory_of(target, machine.host)
    else:
        request["s3"] = target.s3
    return request


def _chosen_disks(policy: Policy, machine: FleetMachine, known: Sequence[str]) -> list[str]:
    """Return the disks that a backup names; none: it takes all. Raises UsageError where none is left."""
    if not (policy.disks or (policy.exclude and known)):
        return []
    chosen = [disk for disk in policy.disks or known if disk not in policy.exclude]
    if not chosen:
        # No name at all would mean all of them.
        raise UsageError(
            f"machine {name_text(machine.name)}: exclude leaves none of its disks; "
            'skip = "…" says that it is not to be backed up'
        )
    return chosen


def words_of(command: Sequence[str], request: Request) -> list[str]:
    """Put a command under the load limits of a request, where it has no options of its own for them."""
    if request["verb"] == "backup":
        return list(command)
    words = list[str]()
    if "nice" in request:
        words += ["nice", "-n", str(request["nice"])]
    if "ionice" in request:
        kind, _, level = request["ionice"].partition(":")
        words += (
            ["ionice", "-t", "-c", "3"]
            if kind == "idle"
            else ["ionice", "-t", "-c", "2", "-n", level]
        )
    return [*words, *command]
