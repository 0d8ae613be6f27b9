# SPDX-License-Identifier: Apache-2.0
"""The verdict on a machine, out of what it has shown so far. Pure: events and times in, a verdict out."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.access.drill.plan import STRENGTH, DrillPlan
from vmapipe.access.drill.result import StepResult, StepState, Verdict
from vmapipe.access.drill.signs import Sign

# With a proof at hand, a stronger one is waited for as long again as that took, and at least so long.
_GRACE_S = 20.0
# A sign of failure counts when nothing has moved since: on no console, nor on the screen. Programs
# that try again do so within some seconds.
_STUCK_S = 10.0
# A guest restarts once after a first boot, and Windows after repairs; a boot loop goes on.
_MOST_RESETS = 4


class Decision(NamedTuple):
    """`seconds`: to the proof, None: there is none."""

    verdict: Verdict
    reason: str
    seconds: float | None = None
    proof: str = ""


class Judge:
    """Hears what happens, each with its time in seconds since the start, and decides."""

    def __init__(self, plan: DrillPlan, limit_s: float) -> None:
        self._plan = plan
        self._limit_s = limit_s
        self._states: list[StepState] = ["silent"] * len(plan.steps)
        self._times: list[float | None] = [None] * len(plan.steps)
        self._details = [""] * len(plan.steps)
        self._resets = 0
        self._sign: Sign | None = None
        self._earlier = ""
        self._moved_s = 0.0
        self._end: Decision | None = None
        # What a console that can be read as text shows at last.
        self.last_line = ""
        self.is_readable = False

    # --- What happens ---

    def answered(self, index: int, at_s: float, detail: str = "") -> None:
        """A step's answer has come, as it should be."""
        if self._states[index] != "answered":
            self._states[index], self._times[index] = "answered", at_s
            self._details[index] = detail

    def wrong(self, index: int, detail: str) -> None:
        """An answer has come, and not the expected one; a later one may be."""
        if self._states[index] != "answered":
            self._states[index], self._details[index] = "wrong", detail

    def moved(self, at_s: float) -> None:
        """Something new was written to a console, or is on the screen."""
        self._moved_s = max(self._moved_s, at_s)

    def shows(self, sign: Sign | None) -> None:
        """A sign of failure, or none any more, is what consoles and screen show now."""
        if self._sign is None or self._sign.weight != "final":
            self._sign = sign
        if sign is not None and sign.weight == "stuck":
            self._earlier = sign.text

    def reset(self, at_s: float) -> None:
        self.moved(at_s)
        self._resets += 1

    def ended(self, verdict: Verdict, reason: str) -> None:
        """What cannot go on: it was switched off, QEMU has ended, the archive is damaged."""
        if self._end is None:
            self._end = Decision(verdict, reason)

    # --- What follows ---

    def is_answered(self, index: int) -> bool:
        return self._states[index] == "answered"

    def steps(self) -> tuple[StepResult, ...]:
        return tuple(
            StepResult(step.title, state, _rounded(time), detail)
            for step, state, time, detail in zip(
                self._plan.steps, self._states, self._times, self._details, strict=True
            )
        )

    def decide(self, now_s: float) -> Decision | None:
        """None: it is too early to say."""
        proof = self._proof()
        if proof is not None and not self._owing(now_s, *proof):
            return self._booted(*proof)
        if self._sign is not None and self._sign.weight == "final":
            # What came before it is often the reason: a boot loader's words, a mount's.
            before = f"; before that, {self._earlier}" if self._earlier else ""
            return Decision("not booted", self._sign.text + before)
        if self._end is not None:
            return self._end
        if self._resets >= _MOST_RESETS:
            return Decision("not booted", f"it has restarted {self._resets} times")
        if self._sign is not None and now_s - self._moved_s >= _STUCK_S and proof is None:
            return Decision("not booted", self._sign.text)
        return self._at_limit(proof) if now_s >= self._limit_s else None

    def _proof(self) -> tuple[int, float] | None:
        """Return the strongest step that has answered, and when."""
        found = [(index, time) for index, time in enumerate(self._times) if time is not None]
        ranked = sorted(found, key=lambda f: (STRENGTH.index(self._plan.steps[f[0]].kind), f[0]))
        return ranked[0] if ranked else None

    def _owing(self, now_s: float, proof: int, at_s: float) -> bool:
        """Tell whether something is still to be waited for."""
        if self._end is not None or now_s >= self._limit_s:
            return bool(self._unfulfilled())
        if "wrong" in self._states:
            return True  # a service that is still starting says something else at first
        open_steps = [
            step
            for step, state in zip(self._plan.steps, self._states, strict=True)
            if state != "answered"
        ]
        if not self._plan.is_default and any(step.is_required for step in open_steps):
            return True
        rank = STRENGTH.index(self._plan.steps[proof].kind)
        is_stronger_open = any(STRENGTH.index(step.kind) <= rank for step in open_steps)
        first_s = min(time for time in self._times if time is not None)
        return is_stronger_open and now_s < max(first_s + _GRACE_S, 2 * first_s)

    def _unfulfilled(self) -> str:
        """Return why the steps that have answered are not enough; empty: they are."""
        for step, state, detail in zip(self._plan.steps, self._states, self._details, strict=True):
            if state == "wrong":
                return f"{step.title}: {detail}"
            if state != "answered" and step.is_required and not self._plan.is_default:
                return f"{step.title}, which the plan requires, did not answer"
        return ""

    def _booted(self, proof: int, at_s: float) -> Decision:
        step, detail = self._plan.steps[proof], self._details[proof]
        reason = f"{step.title}: {detail}" if detail else f"{step.title} answered"
        silent = [
            other.title
            for other, state in zip(self._plan.steps, self._states, strict=True)
            if other.is_required and state != "answered"
        ]
        if silent:
            reason += f"; {', '.join(silent)}, which the configuration has, did not answer"
        return Decision("booted", reason, _rounded(at_s), step.kind)

    def _at_limit(self, proof: tuple[int, float] | None) -> Decision:
        limit = f"within {self._limit_s:.0f} s"
        if why := self._unfulfilled():
            return Decision("not booted", f"{why} ({limit})")
        if proof is not None:
            return self._booted(*proof)
        if self._sign is not None:
            return Decision("not booted", f"{self._sign.text} ({limit})")
        seen = f"; the last line on its screen is {self.last_line!r}" if self.last_line else ""
        expected = [step.title for step in self._plan.steps if step.is_required]
        if expected or not self._plan.is_default:
            what = expected or [step.title for step in self._plan.steps]
            return Decision("not booted", f"no answer {limit}: {', '.join(what)}{seen}")
        if self.is_readable:
            return Decision("not booted", f"no login prompt {limit}{seen}")
        return Decision(
            "undecided",
            f"nothing has answered {limit}, and nothing on the screen says that it failed: look at "
            "the picture, and say in a plan what has to answer",
        )


def _rounded(time: float | None) -> float | None:
    return None if time is None else round(time, 1)
