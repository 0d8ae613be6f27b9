# SPDX-License-Identifier: Apache-2.0
"""The pure parts of a restore test: plans, signs, pictures, transcripts, verdicts; and what is kept."""

from __future__ import annotations

import re
import struct
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.access.drill.judge import Decision, Judge
from vmapipe.access.drill.plan import DrillPlan, Step, default_plan, parse_plan
from vmapipe.access.drill.screen import (
    Picture,
    encode_png,
    is_still,
    looks_graphical,
    parse_ppm,
    text_lines,
)
from vmapipe.access.drill.signs import LOGIN, failure_in, plain
from vmapipe.access.drill.watch import PatternTooSlow, Transcript, bounded_search
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.syscalls import readable

# --- Plans ---

PLAN = b"""
timeout = 300
[[step]]
kind = "command"
run = ["/bin/systemctl", "is-system-running"]
output = "^(running|degraded)$"
required = true
[[step]]
kind = "tcp"
port = 22
regex = "^SSH-2"
address = "192.168.7.20/24"
[[step]]
kind = "serial"
text = "a.b"
[[step]]
kind = "screen"
stable_s = 5
[[step]]
kind = "agent"
"""


def test_a_plan_is_read_with_all_that_a_step_can_say() -> None:
    plan = parse_plan(PLAN)
    assert plan.timeout_s == 300
    command, tcp, serial, screen, agent = plan.steps
    assert command.run == ("/bin/systemctl", "is-system-running")
    assert command.is_required
    assert command.pattern is not None
    assert command.pattern.search("x\ndegraded\n")
    assert (tcp.port, tcp.address) == (22, "192.168.7.20/24")
    assert serial.pattern is not None
    assert serial.pattern.search("a.b")
    assert not serial.pattern.search("axb")
    assert (screen.stable_s, screen.is_lenient) == (5, True)
    assert agent.kind == "agent"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"1 to 20 of \[\[step\]\]"),
        ("x", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("step = 1", "write each step"),
        ('[[step]]\nkind = "sms"', "kind is one of"),
        ('[[step]]\nkind = "agent"\nport = 1', "'port' is not known"),
        ('[[step]]\nkind = "serial"', "which text"),
        ('[[step]]\nkind = "serial"\nregex = "("', "not a valid regular expression"),
        ('[[step]]\nkind = "serial"\nregex = "a"\ntext = "b"', "choose one"),
        ('[[step]]\nkind = "tcp"', "port is missing"),
        ('[[step]]\nkind = "tcp"\nport = 70000', "port is a number"),
        ('[[step]]\nkind = "tcp"\nport = 22\naddress = "10.0.0.1"', "address is the guest"),
        ('[[step]]\nkind = "tcp"\nport = 22\naddress = "10.0.0.0/24"', "address is the guest"),
        ('[[step]]\nkind = "command"', "run is the command"),
        ('[[step]]\nkind = "command"\nrun = [1]', "run is a list of texts"),
        ('[[step]]\nkind = "agent"\nrequired = 1', "required is true or false"),
        ('other = 1\n[[step]]\nkind = "agent"', "'other' is not known"),
        ('timeout = true\n[[step]]\nkind = "agent"', "timeout is a number"),
        ("[[step]]\n" * 21, "1 to 20"),
        ("x" * 70_000, "64 KiB"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_plan(text.encode("latin-1"))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_plan_or_refused(raw: bytes) -> None:
    with pytest.raises(UsageError):
        parse_plan(raw)


def test_an_expression_that_never_ends_is_ended_and_disturbs_nobody() -> None:
    cancel = Cancel()
    cancel.on_signals()
    try:
        pattern = re.compile(r"(a+)+$")
        started = time.process_time()
        with pytest.raises(PatternTooSlow):
            bounded_search(pattern, "a" * 40 + "b")
        assert time.process_time() - started < 30
        assert bounded_search(pattern, "xaa") is not None
        assert not readable([cancel.fd], 0), "who waits for a stop has been woken up"
    finally:
        cancel.close()


# --- What consoles say ---


@pytest.mark.parametrize(
    ("text", "weight", "words"),
    [
        ("No bootable device.  Retrying", "final", "nothing to boot"),
        ("a\nShell> ", "final", "nothing to boot"),
        (
            "[ 1.2] Kernel panic - not syncing: VFS: Unable to mount root fs",
            "final",
            "Unable to mount",
        ),
        ("\ngrub rescue> ", "stuck", "rescue"),
        ("Booting kernel failed: Invalid argument\nboot:", "stuck", "Invalid argument"),
        ("Error loading \\vmlinuz: Unsupported", "stuck", "vmlinuz"),
        ("error: file `/vmlinuz' not found.", "stuck", "not found"),
        ("ALERT!  UUID=x does not exist.  Dropping to a shell!", "stuck", "does not exist"),
        ("(initramfs) ", "stuck", "root file system"),
        ("You are in emergency mode. After logging in", "stuck", "repair"),
        ("BOOTMGR is missing", "stuck", "BOOTMGR"),
        (">>Start PXE over IPv4.", "stuck", "network"),
    ],
)
def test_a_text_that_means_failure_is_known(text: str, weight: str, words: str) -> None:
    sign = failure_in(text)
    assert sign is not None
    assert sign.weight == weight
    assert words in sign.text


@pytest.mark.parametrize(
    "text",
    [
        "[  OK  ] Started Getty on tty1.",
        "Failed to start dev-disk-by\\x2duuid.service",
        "Loading initial ramdisk ...",
        "BdsDxe: starting Boot0001 from PciRoot(0x0)",
        "Booting from 0000:7c00",
        "GNU GRUB  version 2.06",
    ],
)
def test_what_a_good_boot_says_is_no_failure(text: str) -> None:
    assert failure_in(text) is None
    assert not LOGIN.search(text)


def test_a_login_prompt_is_known_in_colours_too() -> None:
    assert LOGIN.search(plain("\x1b[1;32mweb\x1b[0m login: "))
    assert LOGIN.search("\nDebian GNU/Linux 12 web tty1\n\nweb login:")
    assert LOGIN.search("SAC>")
    assert not LOGIN.search("Starting systemd-logind.service - User Login Management...")


@given(st.binary(max_size=3000))
def test_signs_are_looked_for_in_any_bytes(raw: bytes) -> None:
    text = plain(raw.decode("latin-1"))
    assert all(c == "\n" or c.isprintable() for c in text)
    failure_in(text)
    LOGIN.search(text)


@given(st.lists(st.binary(max_size=9000), max_size=6))
def test_a_transcript_has_each_byte_in_a_window_and_keeps_bounded_ends(pieces: list[bytes]) -> None:
    transcript = Transcript()
    windows = [list(transcript.feed(piece)) for piece in pieces]
    assert all(len(window) <= 8192 * 2 for each in windows for window in each)
    assert transcript.kept() == b"".join(pieces)


def test_what_floods_a_console_is_still_searched_and_not_kept() -> None:
    transcript = Transcript()
    flood = b"x" * (5 << 18)
    found = [w for w in transcript.feed(flood + b"\nweb login: " + b"y" * 5000) if LOGIN.search(w)]
    assert found
    assert len(transcript.kept()) < (1 << 20) + 100
    assert b"bytes are left out here" in transcript.kept()


# --- Pictures ---


def picture(width: int, height: int, fill: bytes = b"\0\0\0") -> Picture:
    return Picture(width, height, fill * (width * height))


def painted(base: Picture, x: int, y: int, width: int, height: int) -> Picture:
    pixels = bytearray(base.pixels)
    for row in range(y, y + height):
        at = 3 * (row * base.width + x)
        pixels[at : at + 3 * width] = b"\xff" * (3 * width)
    return base._replace(pixels=bytes(pixels))


def test_a_cursor_is_no_change_and_a_line_of_text_is() -> None:
    dark = picture(1280, 800)
    assert is_still(dark, painted(dark, 16, 32, 8, 16))
    assert not is_still(dark, painted(dark, 0, 32, 1280, 16))
    assert not is_still(dark, picture(720, 400))
    assert is_still(dark, picture(1280, 800))


def test_a_picture_becomes_a_png_that_says_the_same() -> None:
    shown = painted(picture(20, 10), 3, 4, 5, 2)
    assert parse_ppm(b"P6\n20 10\n255\n" + shown.pixels) == shown
    raw = encode_png(shown)
    assert struct.unpack(">II", raw[16:24]) == (20, 10)
    data = zlib.decompress(raw[raw.index(b"IDAT") + 4 : raw.index(b"IEND") - 8])
    assert b"".join(data[at + 1 : at + 61] for at in range(0, len(data), 61)) == shown.pixels


@pytest.mark.parametrize(
    "raw", [b"", b"P6 1 1 255 ab", b"P6 0 0 255 ", b"P6 99999 99999 255 ", b"P5 1 1 255 a"]
)
def test_what_is_no_picture_is_none(raw: bytes) -> None:
    with pytest.raises(ValueError, match="PPM"):
        parse_ppm(raw)


def test_a_desktop_is_told_from_a_console_and_a_logo() -> None:
    row = b"".join(bytes((x % 256, x // 5 % 256, 128)) for x in range(640))
    assert looks_graphical(Picture(640, 480, row * 480))
    assert not looks_graphical(painted(picture(640, 480), 0, 0, 300, 16))
    assert not looks_graphical(picture(640, 480, b"\x10\x20\x30"))


def _screen(rows: list[str]) -> Picture:
    """As a VGA card shows it, with a block for each letter."""
    shown = picture(720, 400)
    for y, row in enumerate(rows):
        for x, letter in enumerate(row):
            if letter != " ":
                shown = painted(shown, 9 * x + 2, 16 * y + 4, 5, 8)
    return shown


def test_only_the_rows_on_the_screen_are_read_not_what_was_there_before() -> None:
    memory = [f"old line {n} " + "x" * n for n in range(30)]
    memory += ["", "Test GNU/Linux", "", "web login:"] + [""] * 21
    raw = b"".join(b"".join(bytes((ord(c), 7)) for c in row.ljust(80)) for row in memory).ljust(
        0x8000, b"\0"
    )
    assert text_lines(_screen(memory[30:55]), raw)[:4] == ["", "Test GNU/Linux", "", "web login:"]
    assert text_lines(_screen(memory[:25]), raw)[3] == "old line 3 xxx"
    assert text_lines(_screen(["#" * 80] * 25), raw) == []


@given(st.binary(max_size=0x8000))
def test_any_text_memory_is_rows_of_printable_letters(raw: bytes) -> None:
    for row in text_lines(picture(720, 400), raw.ljust(25 * 160, b"\0")):
        assert row.isprintable()


# --- Verdicts ---

AGENT = default_plan(agent_expected=True)
NO_AGENT = default_plan(agent_expected=False)


def verdict(judge: Judge, now_s: float) -> Decision:
    decision = judge.decide(now_s)
    assert decision is not None
    return decision


def test_the_strongest_that_answers_is_the_proof() -> None:
    judge = Judge(AGENT, 100)
    assert judge.decide(5) is None
    judge.answered(2, 10, "it said 'login:'")
    assert judge.decide(11) is None, "the agent may still come"
    judge.answered(0, 14)
    assert verdict(judge, 14) == Decision("booted", "agent answered", 14, "agent")


def test_a_login_prompt_is_enough_where_the_agent_stays_silent_and_that_is_said() -> None:
    judge = Judge(AGENT, 100)
    judge.answered(1, 10, "it said 'login:'")
    assert judge.decide(29) is None
    decision = verdict(judge, 31)
    assert (decision.verdict, decision.seconds, decision.proof) == ("booted", 10, "serial")
    assert "agent, which the configuration has, did not answer" in decision.reason


def test_a_panic_is_told_at_once_with_what_came_before_it() -> None:
    judge = Judge(AGENT, 600)
    judge.shows(failure_in("ALERT! UUID=x does not exist"))
    assert judge.decide(1) is None
    judge.shows(failure_in("Kernel panic - not syncing: no init"))
    judge.shows(None)
    decision = verdict(judge, 2)
    assert decision.verdict == "not booted"
    assert "no init" in decision.reason
    assert "does not exist" in decision.reason


def test_a_sign_that_others_get_over_counts_when_nothing_has_moved_since() -> None:
    judge = Judge(NO_AGENT, 600)
    judge.shows(failure_in("\ngrub rescue> "))
    judge.moved(5)
    assert judge.decide(14) is None
    assert verdict(judge, 15).verdict == "not booted"
    judge = Judge(NO_AGENT, 600)
    judge.shows(failure_in("BdsDxe: failed to load Boot0001"))
    judge.shows(None)
    assert judge.decide(100) is None


def test_what_hangs_has_not_booted_and_what_nobody_can_read_is_undecided() -> None:
    judge = Judge(AGENT, 60)
    assert judge.decide(59) is None
    assert verdict(judge, 60).verdict == "not booted"
    judge = Judge(NO_AGENT, 60)
    assert verdict(judge, 60).verdict == "undecided"
    judge.is_readable, judge.last_line = True, "Loading initial ramdisk ..."
    decision = verdict(judge, 60)
    assert decision.verdict == "not booted"
    assert "Loading initial ramdisk" in decision.reason


def test_an_answer_that_is_not_the_expected_one_is_waited_for_and_then_counts() -> None:
    plan = DrillPlan((Step("command", re.compile("^active"), ("x",)), Step("agent")))
    judge = Judge(plan, 60)
    judge.answered(1, 5)
    judge.wrong(0, "it said 'activating'")
    assert judge.decide(50) is None
    decision = verdict(judge, 60)
    assert decision.verdict == "not booted"
    assert "activating" in decision.reason
    judge.answered(0, 58)
    assert verdict(judge, 60).proof == "command"


def test_a_required_step_that_is_silent_is_a_failure() -> None:
    plan = DrillPlan((Step("agent"), Step("tcp", port=22, is_required=True)))
    judge = Judge(plan, 60)
    judge.answered(0, 5)
    assert judge.decide(59) is None
    assert "tcp port 22, which the plan requires" in verdict(judge, 60).reason
    judge.answered(1, 59)
    assert verdict(judge, 59).proof == "agent"


def test_a_machine_that_ends_or_restarts_for_ever_has_not_booted() -> None:
    judge = Judge(AGENT, 60)
    for at_s in range(4):
        assert judge.decide(at_s) is None
        judge.reset(at_s)
    assert "restarted 4 times" in verdict(judge, 4).reason
    judge = Judge(AGENT, 60)
    judge.ended("not booted", "it switched itself off")
    judge.ended("undecided", "later")
    assert verdict(judge, 1) == Decision("not booted", "it switched itself off")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["answered", "wrong", "moved", "final", "stuck", "none", "reset", "ended"]
            ),
            st.integers(0, 2),
            st.floats(0, 5),
        ),
        max_size=20,
    ),
    st.booleans(),
)
def test_whatever_happens_there_is_a_verdict_at_the_limit_that_fits(
    happened: list[tuple[str, int, float]], expected: bool
) -> None:
    judge, now = Judge(default_plan(agent_expected=expected), 60), 0.0
    answered = False
    for what, index, after in happened:
        now += after
        match what:
            case "answered":
                judge.answered(index, now)
                answered = True
            case "wrong":
                judge.wrong(index, "x")
            case "moved":
                judge.moved(now)
            case "final":
                judge.shows(failure_in("Kernel panic - not syncing"))
            case "stuck":
                judge.shows(failure_in("\n(initramfs) "))
            case "none":
                judge.shows(None)
            case "reset":
                judge.reset(now)
            case "ended":
                judge.ended("not booted", "ended")
        judge.decide(now)
    decision = verdict(judge, max(now, 60))
    assert decision.reason
    assert (decision.verdict == "booted") == (decision.seconds is not None)
    assert answered or decision.verdict != "booted"
    assert len(judge.steps()) == 3
