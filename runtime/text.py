# SPDX-License-Identifier: Apache-2.0
"""Texts from outside (names, other programs' words) made fit for a terminal, a log, a table. Pure."""

from __future__ import annotations

# A path has up to 4095 bytes, and a message may name one and say why: what ordinary
# use can bring about is never cut. What is longer was made long on purpose.
MAX_LINE_CHARS = 6000
# In a table or beside other names; a file's name has up to 255 bytes.
MAX_NAME_CHARS = 260


def one_line(text: str, limit_chars: int = MAX_LINE_CHARS) -> str:
    """Escape what could move a cursor or begin a line, and leave out the middle of what is too long.

    The result has at most `limit_chars` characters (of more than 100). The middle, because a message
    opens with what it is about and closes with the reason and the way out.
    """
    # First: escaping megabytes to throw them away would cost, too.
    text = _shortened(text, limit_chars)
    if text.isprintable():
        return text
    return _shortened(escaped(text), limit_chars)


def name_text(name: str) -> str:
    """A name as `repr` shows it, and not longer than a name should be."""
    return repr(_shortened(name, MAX_NAME_CHARS))


def file_lines(text: str) -> list[str]:
    """The lines of a file as Unix programs count them, without their ends, LF or CR LF.

    `str.splitlines` also ends one at U+2028, a form feed and more: a comment's second half would count.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def without_user(text: str) -> str:
    """A text that may hold a URI, without the user and the password that the URI may have."""
    before, scheme, rest = text.partition("://")
    # To the last one: a password may have any character, and too little is better than a part of it.
    return before + scheme + rest.rpartition("@")[2]


def human_bytes(count: float) -> str:
    """1536 to `1.5 KiB`."""
    if abs(count) < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def human_age(seconds: float) -> str:
    """5400 to `90 min`, 93600 to `26 h`, 864000 to `10 d`: two or three digits, rounded."""
    # A unit begins where the one before would need more than two digits to be told apart.
    for unit_s, least_s, unit in ((86400, 72 * 3600, "d"), (3600, 100 * 60, "h"), (60, 100, "min")):
        if round(seconds) >= least_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _shortened(text: str, limit_chars: int) -> str:
    if len(text) <= limit_chars:
        return text
    # 60: the note between them, with any number of digits that fits into memory.
    kept = limit_chars - 60
    head, tail = kept - kept // 4, kept // 4
    return f"{text[:head]} … ({len(text) - kept} characters left out) … {text[-tail:]}"


def escaped(text: str) -> str:
    """Escape what could move a cursor or begin a line, whatever the length."""
    return "".join(char if char.isprintable() else _escape_of(char) for char in text)


def _escape_of(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        # A byte of a file's name that is no letter in the encoding of names: as it is there.
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
