# SPDX-License-Identifier: Apache-2.0
"""The guest agent (qemu-ga) at its socket, and the process that freezes a guest's file systems through it.

python -m vmapipe.control.qemu.guest_agent --parent-fd N --agent SOCKET
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from vmapipe.control.qemu.freezing import (
    FIND_S,
    FREEZE_S,
    THAW_S,
    AgentRefused,
    Freezing,
    frozen_by,
    keep_frozen,
)
from vmapipe.control.qmp.addresses import Address, connect
from vmapipe.control.qmp.answers import SIZE
from vmapipe.control.qmp.client import Wire
from vmapipe.control.qmp.reader import SHORT_LIMITS, JsonReader, Unreadable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.process import run_child
from vmapipe.runtime.text import one_line

# An agent that is alive answers a ping at once; a guest under load takes longer.
_SYNC_S = FIND_S
# An agent's reasons are a sentence.
_WORDS_CHARS = 1000
# Its socket takes one client at a time; one that asks it something leaves within moments.
_CONNECT_S = 3.0
FREEZE = "guest-fsfreeze-freeze"
_LATE = {
    FREEZE: ": the guest has much to write out, or a hook of its own (a database's) takes its "
    "time; try at a quieter hour. Without --agent the backup is as after a power cut"
}
# Marks the beginning of an answer (qemu-ga's guest-sync-delimited).
_DELIMITER = b"\xff"


class GuestAgent:
    """A connection to qemu-ga. Every method raises Failure."""

    def __init__(self, path: str, cancel: Cancel | None = None) -> None:
        """Connect and synchronise; a stop that `cancel` asks for ends every wait: Cancelled."""
        self._path = path
        deadline = time.monotonic() + _SYNC_S
        try:
            sock = connect(Address(path), time.monotonic() + _CONNECT_S)
        except OSError as error:
            raise self._silent(error) from error
        self._wire = Wire(sock, JsonReader(SHORT_LIMITS), cancel)
        try:
            self._sync(deadline)
        except OSError as error:
            self.close()
            raise self._silent(error) from error
        except BaseException:
            self.close()
            raise

    def execute(
        self, command: str, timeout_s: float, arguments: Mapping[str, Any] | None = None
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        try:
            self._wire.send(request, deadline)
            answer = self._wire.receive(deadline)
        except TimeoutError as error:
            raise Failure(
                f"the guest agent at {self._path} has not answered {command} within "
                f"{timeout_s:.0f} s{_LATE.get(command, '')}"
            ) from error
        except OSError as error:
            raise self._silent(error) from error
        except Unreadable as error:
            raise self._not_valid(command, str(error)) from error
        if "return" in answer:
            return answer["return"]
        described = answer.get("error")
        text = described.get("desc") if isinstance(described, dict) else None
        if not isinstance(text, str):
            raise self._not_valid(command, "it has neither a member 'return' nor an 'error'")
        raise AgentRefused(
            f"the guest agent at {self._path} refuses {command}: {one_line(text, _WORDS_CHARS)}"
        )

    def close(self) -> None:
        self._wire.close()

    def _sync(self, deadline: float) -> None:
        """Skip whatever an earlier client has left: ours is the answer with our number."""
        number = time.monotonic_ns() & 0x7FFFFFFF
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        line = json.dumps(request).encode() + b"\n"
        self._wire.send_bytes(_DELIMITER + line, deadline)
        reader, is_answer = self._wire.reader, False
        while True:
            is_answer = reader.drop_to(_DELIMITER) or is_answer
            if not is_answer:
                reader.drop()
            try:
                while is_answer and (answer := reader.next()) is not None:
                    if answer.get("return") == number:
                        return
            except Unreadable:
                is_answer = False
            if time.monotonic() >= deadline:
                raise TimeoutError("it does not answer")
            self._wire.wait(deadline)
            self._wire.take()

    def _silent(self, error: OSError) -> Failure:
        return Failure(
            f"the guest agent at {self._path}: {os_error_text(error)}; is qemu-guest-agent running "
            "in the guest, and nobody else connected to it? Without --agent the backup is as after a "
            "power cut"
        )

    def _not_valid(self, command: str, why: str) -> Failure:
        return Failure(
            f"the guest agent at {self._path}: its answer to {command} is not valid: {why}"
        )


class AgentFreezer:
    """A guest's file systems, by the socket of its agent: a `Freezer`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._agent: GuestAgent | None = None
        self.by_hand = f'send {{"execute": "guest-fsfreeze-thaw"}} to {path}'

    def reach(self, cancel: Cancel) -> None:
        # Kept open: nobody else gets the port until the guest is thawed.
        self._agent = GuestAgent(self._path, cancel)

    def freeze(self, cancel: Cancel) -> int:
        if self._agent is None:
            raise RuntimeError("the agent has not been reached")
        count = self._agent.execute(FREEZE, FREEZE_S)
        if fault := SIZE.fault(count):
            raise Failure(
                f"the guest agent at {self._path}: its answer to {FREEZE} is not valid: it{fault}"
            )
        return int(count)

    def thaw(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        # A connection of its own: the other one may be in the middle of something.
        agent = GuestAgent(self._path)
        try:
            agent.execute("guest-fsfreeze-thaw", THAW_S)
        finally:
            agent.close()


def freezing_of(agent: str) -> Freezing:
    """Return how a guest is frozen through its agent at this socket."""
    module, words = "vmapipe.control.qemu.guest_agent", [f"--agent={agent}"]
    return Freezing(module, words, lambda: AgentFreezer(agent))


def frozen(agent: str, emit: Emit, cancel: Cancel) -> AbstractContextManager[None]:
    """See `frozen_by`; `agent`: the socket."""
    return frozen_by(freezing_of(agent), emit, cancel)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe.control.qemu.guest_agent")
    parser.add_argument("--parent-fd", type=int, default=None)
    parser.add_argument("--agent", required=True, metavar="SOCKET")
    options = parser.parse_args(argv)

    def work(cancel: Cancel, emit: Emit) -> None:
        keep_frozen(AgentFreezer(options.agent), cancel, emit)

    return run_child(parser.prog, options.parent_fd, work, _print)


def _print(event: Event) -> None:
    print(event["event"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
