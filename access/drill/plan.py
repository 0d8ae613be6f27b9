# SPDX-License-Identifier: Apache-2.0
"""What has to answer for a machine to have booted: a plan, as TOML or made of its configuration. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from vmapipe.access.drill.signs import LOGIN
from vmapipe.access.machine.argv import network_of
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import one_line

Kind = Literal["command", "agent", "serial", "tcp", "screen"]
#: Strongest first: of those that answer, the first is the proof.
STRENGTH: tuple[Kind, ...] = get_args(Kind)

# A plan is written by a person.
MAX_PLAN_BYTES = 64 << 10
_MAX_STEPS = 20
_MAX_PATTERN_CHARS = 500
_MAX_WORDS = 100
_MAX_WORD_CHARS = 4000
# A guest that is slow at its work shows something new more often than that.
_STABLE_S = 10
_MAX_S = 24 * 3600

_ALLOWED: Mapping[Kind, frozenset[str]] = {
    "command": frozenset({"run", "output", "exit_code"}),
    "agent": frozenset(),
    "serial": frozenset({"text", "regex"}),
    "tcp": frozenset({"port", "send", "text", "regex", "address"}),
    "screen": frozenset({"text", "regex", "stable_s"}),
}


class Step(NamedTuple):
    """One way to ask. `pattern`: what the answer has to contain; None: any answer will do.

    `run`: the words of a command in the guest; `send`, `port`, `address`: of a TCP connection;
    `is_required`: without it the machine counts as not booted. `is_lenient`: a picture that only
    stays as it is will do.
    """

    kind: Kind
    pattern: re.Pattern[str] | None = None
    run: tuple[str, ...] = ()
    exit_code: int = 0
    port: int = 0
    send: bytes = b""
    address: str = ""
    stable_s: float = _STABLE_S
    is_required: bool = False
    is_lenient: bool = False

    @property
    def title(self) -> str:
        """Its name in reports."""
        if self.kind == "command":
            return f"command {one_line(' '.join(self.run), 120)}"
        if self.kind == "tcp":
            return f"tcp port {self.port}"
        return self.kind


class DrillPlan(NamedTuple):
    """`timeout_s`: 0: the usual one; `is_default`: nobody has written it."""

    steps: tuple[Step, ...]
    timeout_s: float = 0
    is_default: bool = False


def default_plan(*, agent_expected: bool) -> DrillPlan:
    """Return what can be expected of a machine by its configuration.

    The agent is asked in any case; it has to answer, or a login prompt be there in its place, where the
    configuration says that there is one.
    """
    steps = (
        Step("agent", is_required=agent_expected),
        Step("serial", LOGIN),
        Step("screen", LOGIN),
    )
    return DrillPlan(steps, is_default=True)


def parse_plan(raw: bytes) -> DrillPlan:
    """Raises UsageError."""
    if len(raw) > MAX_PLAN_BYTES:
        raise UsageError(f"the plan has more than {MAX_PLAN_BYTES >> 10} KiB")
    try:
        found = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the plan is not valid TOML: {error}") from error
    timeout_s = _number(found, "timeout", 0, _MAX_S, "the plan")
    _refuse_unknown(found, {"timeout", "step"}, "the plan")
    steps = found.get("step", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UsageError("the plan: write each step as [[step]]")
    if not 1 <= len(steps) <= _MAX_STEPS:
        raise UsageError(f"the plan: it needs 1 to {_MAX_STEPS} of [[step]]")
    parsed = tuple(
        _step(step, f"step {number} of the plan") for number, step in enumerate(steps, 1)
    )
    if len({step.address for step in parsed if step.address}) > 1:
        raise UsageError("the plan: the machine has one address; two steps name different ones")
    return DrillPlan(parsed, timeout_s)


def _step(fields: Mapping[str, Any], where: str) -> Step:
    kind = fields.get("kind")
    if kind not in STRENGTH:
        raise UsageError(f"{where}: kind is one of {', '.join(STRENGTH)}")
    _refuse_unknown(fields, {"kind", "required", *_ALLOWED[kind]}, where)
    required = fields.get("required", False)
    if not isinstance(required, bool):
        raise UsageError(f"{where}: required is true or false")
    pattern = _pattern(fields, where)
    run = tuple(_texts(fields, "run", where))
    port = int(_number(fields, "port", 0, 65535, where))
    address = _text(fields, "address", where)
    if kind == "command" and (not run or not run[0]):
        raise UsageError(
            f'{where}: run is the command\'s words, as ["/bin/systemctl", "is-system-running"]'
        )
    if kind == "tcp" and not port:
        raise UsageError(f"{where}: port is missing")
    if kind == "serial" and pattern is None:
        raise UsageError(f"{where}: say which text (or regex) has to come")
    if address and network_of(address) is None:
        raise UsageError(f"{where}: address is the guest's own, as 192.168.1.5/24")
    return Step(
        kind,
        pattern,
        run,
        int(_number(fields, "exit_code", 0, 255, where)),
        port,
        _text(fields, "send", where).encode(),
        address,
        _number(fields, "stable_s", _STABLE_S, 600, where),
        required,
        is_lenient=kind == "screen" and pattern is None,
    )


def _pattern(fields: Mapping[str, Any], where: str) -> re.Pattern[str] | None:
    words = [key for key in ("text", "regex", "output") if key in fields]
    if not words:
        return None
    if len(words) > 1:
        raise UsageError(f"{where}: {' and '.join(words)}: choose one")
    text = _text(fields, words[0], where)
    if not text or len(text) > _MAX_PATTERN_CHARS:
        raise UsageError(f"{where}: {words[0]} has 1 to {_MAX_PATTERN_CHARS} letters")
    try:
        return re.compile(re.escape(text) if words[0] == "text" else text, re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{where}: not a valid regular expression: {error}") from error


def _refuse_unknown(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in fields:
        if key not in known:
            raise UsageError(
                f"{where}: {one_line(key, 120)!r} is not known: {', '.join(sorted(known))}"
            )


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str) or len(value) > _MAX_WORD_CHARS:
        raise UsageError(f"{where}: {key} is a text")
    return value


def _texts(fields: Mapping[str, Any], key: str, where: str) -> Sequence[str]:
    value = fields.get(key, [])
    is_list = isinstance(value, list) and len(value) <= _MAX_WORDS
    if not is_list or not all(isinstance(v, str) and len(v) <= _MAX_WORD_CHARS for v in value):
        raise UsageError(f"{where}: {key} is a list of texts")
    return [str(word) for word in value]


def _number(fields: Mapping[str, Any], key: str, default: float, most: float, where: str) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise UsageError(f"{where}: {key} is a number from 0 to {most:g}")
    return value
