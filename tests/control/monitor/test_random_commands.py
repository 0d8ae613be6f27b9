# SPDX-License-Identifier: Apache-2.0
"""A real monitor against a model of its job: random commands of two clients, statuses always agree."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.control.monitor.foreign import Foreign, Refused, connected
from tests.machine import make_disk, run
from tests.producer.guard.serving import serving

CLUSTER = 65536
SIZES = {"a": 24 * CLUSTER + 4096, "b": 16 * CLUSTER}
# A byte a second: it runs until it is hurried or ended.
CRAWL = 1
# How many random commands a whole run has at least.
COMMANDS = 1000

devlists = st.sampled_from((None, "a", "b", "a,b", "b;a", "a:b"))
refusals = st.sampled_from(
    (
        ({"devlist": "a,nix"}, "Device 'nix' not found"),
        ({"devlist": ""}, "empty device list"),
        ({"format": "raw"}, "no backup driver for format 'raw'"),
        ({"config-file": "/nix"}, "unable to read file '/nix'"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ({"state": True}, "there is no state to save"),
        ({"backup-file": "/nix/x.vma"}, "No such file or directory"),
    )
)


class Commands(RuleBasedStateMachine):
    """One monitor for all lives; each takes up the status that the life before has left."""

    clients: tuple[Foreign, Foreign]
    folder: Path
    #: The model: what `query-backup` owes, without what only the real one can know.
    status: ClassVar[dict[str, Any]] = {}
    commands = 0
    verified = 0

    @property
    def model(self) -> dict[str, Any]:
        return type(self).status

    @property
    def active(self) -> bool:
        return self.model.get("status") == "active"

    def cmd(self, who: int, name: str, arguments: dict[str, Any] | None = None) -> Any:
        type(self).commands += 1
        return self.clients[who].cmd(name, arguments)

    def refused(self, who: int, name: str, arguments: dict[str, Any]) -> str:
        with pytest.raises(Refused) as caught:
            self.cmd(who, name, arguments)
        return caught.value.desc

    @rule(who=st.integers(0, 1), devlist=devlists, in_words=st.booleans())
    def backup(self, who: int, devlist: str | None, in_words: bool) -> None:
        file = str(self.folder / f"{uuid.uuid4().hex}.vma")
        words: dict[str, Any] = {"backup-file": file, "speed": CRAWL}
        if devlist:
            words["devlist"] = devlist
        if self.active:
            assert self.refused(who, "backup", words) == "previous backup not finished"
        elif in_words:
            line = f"backup {file} {CRAWL}B {devlist or ''}"
            assert self.cmd(who, "human-monitor-command", {"command-line": line}) == ""
            self._has_begun(file, devlist, self.clients[who].status()["uuid"])
        else:
            self._has_begun(file, devlist, self.cmd(who, "backup", words))
        self._agree()

    def _has_begun(self, file: str, devlist: str | None, identity: str) -> None:
        names = set("ab") if devlist is None else set(devlist) & set("ab")
        total = sum(SIZES[name] for name in names)
        type(self).status = {
            "status": "active",
            "total": total,
            "backupfile": file,
            "uuid": identity,
        }
        for client in self.clients:
            told = client.next_event("BACKUP_STARTED")["data"]
            assert told["uuid"] == identity

    @rule(who=st.integers(0, 1), case=refusals)
    def backup_that_cannot_be(self, who: int, case: tuple[dict[str, Any], str]) -> None:
        words, why = case
        file = str(self.folder / "never.vma")
        said = self.refused(who, "backup", {"backup-file": file, **words})
        assert why in said or (self.active and said == "previous backup not finished")
        self._agree()

    @rule(who=st.integers(0, 1), speed=st.integers(1, 3))
    def crawls_on(self, who: int, speed: int) -> None:
        if self.active:
            assert self.cmd(who, "backup-set-speed", {"speed": speed}) == {}
        else:
            assert "no backup is running" in self.refused(who, "backup-set-speed", {"speed": 1})
        self._agree()

    @rule(who=st.integers(0, 1))
    def goes_on_to_its_end(self, who: int) -> None:
        if not self.active:
            return
        self.cmd(who, "backup-set-speed", {"speed": 0})
        self._has_ended("BACKUP_COMPLETED", {"status": "done"})
        assert run("verify", "--quiet", self.model["backupfile"]).returncode == 0
        type(self).verified += 1
        os.unlink(self.model["backupfile"])
        os.unlink(self.model["backupfile"] + ".manifest.json")

    @rule(who=st.integers(0, 1), name=st.sampled_from(("backup-cancel", "backup_cancel")))
    def cancel(self, who: int, name: str) -> None:
        assert self.cmd(who, name) == {}
        if self.active:
            self._has_ended("BACKUP_CANCELLED", {"status": "error", "errmsg": "backup canceled"})
        self._agree()

    def _has_ended(self, event: str, members: dict[str, Any]) -> None:
        type(self).status = self.model | members
        for client in self.clients:
            assert client.end_of_backup()["event"] == event
        self._agree()

    @rule(who=st.integers(0, 1))
    def look(self, who: int) -> None:
        type(self).commands += 1
        text = self.clients[who].human("info backup")
        assert (text == "") == (self.model == {})
        assert f"Backup status: {self.model.get('status', '')}" in text or not text
        self._agree()

    def _agree(self) -> None:
        for client in self.clients:
            type(self).commands += 1
            real = client.status()
            assert {name: real.get(name) for name in self.model} == self.model
            assert set(real) >= set(self.model)
            if not self.model:
                assert real == {}
                continue
            assert real["transferred"] <= real["total"]
            assert ("errmsg" in real) == (real["status"] == "error")
            assert ("end-time" in real) == (real["status"] != "active")
            assert real["status"] != "done" or real["transferred"] == real["total"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_statuses_always_agree_with_a_model_over_a_thousand_random_commands() -> None:
    with tempfile.TemporaryDirectory(prefix="vmapipe-test-") as name, contextlib.ExitStack() as s:
        folder = Path(name)
        a = make_disk(folder / "a.raw", "A0h" * 8 + "A", tail_bytes=4096)
        b = make_disk(folder / "b.raw", "A" * 16)
        served = s.enter_context(serving(folder, a=a, b=b))
        Commands.clients = (
            s.enter_context(connected(served.monitor)),
            s.enter_context(connected(served.monitor)),
        )
        Commands.folder, Commands.status, Commands.commands = folder, {}, 0
        Commands.verified = 0
        # Lives of one monitor depend on each other: nothing is shrunk or tried again.
        how = settings(max_examples=12, stateful_step_count=60, deadline=None)
        run_state_machine_as_test(Commands, settings=settings(how, phases=(Phase.generate,)))
        print(f"{Commands.commands} commands, {Commands.verified} archives verified")
        assert Commands.commands >= COMMANDS
        assert Commands.verified >= 10
        # The last life may have left one at its crawl.
        Commands.clients[0].cmd("backup-cancel")
        assert not list(folder.glob("*.vma*"))
