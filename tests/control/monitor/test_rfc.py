# SPDX-License-Identifier: Apache-2.0
"""The RFC's schema and texts, replayed as one script (rfc.txt) by QEMU's own client."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.control.monitor.foreign import Foreign, Refused, connected
from tests.machine import good, make_disk
from tests.producer.guard.serving import serving

SCRIPT = Path(__file__).with_name("rfc.txt")
HOLE = re.compile(r"<(int|uuid)(?::(\w+))?>")
SHAPES = {"int": r"[0-9]+", "uuid": "-".join(f"[0-9a-f]{{{n}}}" for n in (8, 4, 4, 4, 12))}


class Replay:
    """Gives a script's lines to a monitor and compares what comes back."""

    def __init__(self, qmp: Foreign, folder: Path) -> None:
        self._qmp = qmp
        self._folder = folder
        #: What stood where the script has a name.
        self._names: dict[str, str] = {}
        self.steps = 0

    def run(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        while lines:
            line = lines.pop(0).replace("DIR", str(self._folder))
            expected = []
            while lines and lines[0][0] in "=!":
                expected.append(lines.pop(0).replace("DIR", str(self._folder)))
            self._step(line, expected)
            self.steps += 1

    def _step(self, line: str, expected: list[str]) -> None:
        kind, _, rest = line.partition(" ")
        match kind:
            case "event":
                # Progress may come at any time; every other event is in the script.
                others = ("STARTED", "COMPLETED", "FAILED", "CANCELLED")
                event = self._qmp.next_event(*(f"BACKUP_{other}" for other in others))
                assert event["event"] == rest
            case "hmp":
                wanted = [answer.removeprefix("= ") for answer in expected]
                said = self._qmp.human(rest)
                assert said == "" or said.endswith("\r\n")
                said_lines = said.removesuffix("\r\n").split("\r\n") if said else []
                assert len(said_lines) == len(wanted), (line, said)
                for one, shape in zip(said_lines, wanted, strict=True):
                    self._compare(line, one, shape)
            case "qmp":
                name, _, members = rest.partition(" ")
                (answer,) = expected
                said = self._answer(name, json.loads(members) if members else {})
                self._compare(line, said, self._normal(answer))
            case _:
                raise AssertionError(f"{SCRIPT.name}: {line}")

    def _answer(self, name: str, members: dict[str, Any]) -> str:
        try:
            return "= " + json.dumps(self._qmp.cmd(name, members), sort_keys=True)
        except Refused as refused:
            return f"! {refused.kind} {refused.desc}"

    @staticmethod
    def _normal(answer: str) -> str:
        """Members in the order in which they are compared; a number's hole has no quotes."""
        if answer[0] == "!":
            return answer
        text = json.dumps(json.loads(answer[2:]), sort_keys=True)
        return "= " + text.replace('"<int>"', "<int>")

    def _compare(self, line: str, said: str, shape: str) -> None:
        pattern, at, named = "", 0, []
        for hole in HOLE.finditer(shape):
            pattern += re.escape(shape[at : hole.start()])
            kind, name = hole.groups()
            if name in self._names:
                pattern += re.escape(self._names[name])
            else:
                pattern += f"({SHAPES[kind]})"
                named.append(name)
            at = hole.end()
        found = re.fullmatch(pattern + re.escape(shape[at:]), said)
        assert found, f"{line}\nexpected {shape}\ngot      {said}"
        for name, value in zip(named, found.groups(), strict=True):
            if name:
                self._names[name] = value


def test_the_rfcs_monitor_is_replayed(tmp_path: Path) -> None:
    a = make_disk(tmp_path / "a.raw", "A0" * 32, seed=1)
    b = make_disk(tmp_path / "b.raw", "A" * 32, seed=2)
    (tmp_path / "vm.conf").write_text("name: vm\n")
    with serving(tmp_path, a=a, b=b) as served, connected(served.monitor) as qmp:
        replay = Replay(qmp, tmp_path)
        replay.run(SCRIPT.read_text())
    assert replay.steps > 30
    good("verify", tmp_path / "a.vma")
