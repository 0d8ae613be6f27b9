# SPDX-License-Identifier: Apache-2.0
"""Argument types, checks and option groups that several command lines share."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from vmapipe.runtime.errors import EXIT_USAGE, UsageError
from vmapipe.runtime.logs import LEVELS, TRACE_LEVELS, VARIABLE, start_logging
from vmapipe.runtime.text import one_line, without_user

# Longer lines are hard to read, however wide the terminal is.
_PROSE_CHARS = 100
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# An archiver holds up to 3.6 MiB of a disk's data back until its extent is full;
# less than twice that would let guests wait for nothing.
MIN_BUFFER_BYTES = 8 << 20
# Beside the ring (16.5 MiB) it has to fit into what an archiver maps (256 MiB).
MAX_BUFFER_BYTES = 192 << 20
# What a guard takes (protocol.guard.MAX_SLOTS clusters).
MAX_SPOOL_BYTES = 64 << 30

# What the address of a service begins with, and no name of an archive.
_SERVICES = ("tcp://", "ipc://")


def make_parser(
    prog: str, description: str, epilog: str, *, has_log: bool = False
) -> argparse.ArgumentParser:
    """Return a parser whose examples keep their line breaks, and that says in one line what is wrong.

    `has_log`: the program writes a log, and `--log-level` chooses its least level, too.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--log-level",
        choices=LEVELS if has_log else TRACE_LEVELS,
        action=_LogLevel,
        help="show on stderr what processes, peers and QEMU tell each other (debug), and what comes "
        "with each piece of data (trace)"
        + ("; or the least level of the --log (default: info)" if has_log else ""),
    )
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills prose to the terminal's width, and lets lines that are indented, as examples are, be."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        import textwrap  # late, as argparse itself: few commands are asked for help

        filled: list[str] = []
        prose: list[str] = []

        def end_prose() -> None:
            # Not at hyphens: an option, a path and a command stay whole.
            filled.append(
                textwrap.fill(
                    " ".join(prose),
                    min(width, _PROSE_CHARS),
                    initial_indent=indent,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
            prose.clear()

        for line in text.splitlines():
            is_prose = bool(line) and not line[0].isspace()
            if is_prose:
                prose.append(line)
            # What ends with a colon stands above what it speaks of.
            if prose and (not is_prose or line.endswith(":")):
                end_prose()
            if not is_prose:
                filled.append(indent + line if line else "")
        if prose:
            end_prose()
        return "\n".join(filled)


def add_first_group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """A group of options that `--help` prints before all others."""
    group = parser.add_argument_group(title)
    # argparse prints groups in the order of their making; its own two are made with the parser.
    parser._action_groups.insert(1, parser._action_groups.pop())
    return group


class _LogLevel(argparse.Action):
    """Applies `--log-level` as soon as it is read: also to what the other options start."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        os.environ[VARIABLE] = str(values)
        setattr(namespace, self.dest, values)
        start_logging()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage above it would hide them (see --help)."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def size(text: str) -> int:
    """`10M` to bytes; the suffixes K, M, G, T are powers of 1024, as in QEMU's monitor."""
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = digits[-1:] if digits[-1:] in _UNITS else ""
    number = digits[: len(digits) - len(unit)]
    try:
        value = float(number) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid size (like 512K, 10M, 1.5G)"
        ) from None
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range")
    return int(value)


def buffer_size(text: str) -> int:
    """A size within what a buffer for old data may have."""
    value = size(text)
    if not MIN_BUFFER_BYTES <= value <= MAX_BUFFER_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not between {MIN_BUFFER_BYTES >> 20}M and {MAX_BUFFER_BYTES >> 20}M"
        )
    return value


def spool_size(text: str) -> int:
    """A size that a spool file may have."""
    value = size(text)
    if value > MAX_SPOOL_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_SPOOL_BYTES >> 30}G")
    return value


def wait_time(text: str) -> int:
    """Parse whole seconds, up to an hour."""
    if not text.isdecimal() or not 1 <= int(text) <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 3600")
    return int(text)


_LATENCY = r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)"
_LATENCY_PARTS = {"us": 1e6, "ms": 1e3, "s": 1.0}
# Below, no disk answers; above, guests give up a disk.
_LEAST_LATENCY_S, _MOST_LATENCY_S = 0.0001, 10.0


def latency(text: str) -> float:
    """`20ms` to seconds; from 100us to 10s."""
    match = re.fullmatch(_LATENCY, text.strip())
    value_s = float(match[1]) / _LATENCY_PARTS[match[2]] if match else 0.0
    if not _LEAST_LATENCY_S <= value_s <= _MOST_LATENCY_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time from 100us to 10s (like 20ms or 0.5s)"
        )
    return value_s


AGE_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}


def duration_s(text: str, units_s: Mapping[str, int] = AGE_UNITS_S) -> int | None:
    """Return the seconds of up to five digits and a unit; None: the text is something else."""
    number, unit = text[:-1], text[-1:]
    if unit in units_s and number.isascii() and number.isdecimal() and len(number) < 6:
        return int(number) * units_s[unit]
    return None


def age_s(text: str) -> int:
    """Parse 12h, 7d, 2w."""
    found = duration_s(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid time: 12h, 7d, 2w")
    return found


def share(text: str) -> float:
    """Parse 5%, 0.5%."""
    number = text.removesuffix("%")
    try:
        value = float(number) / 100 if number.replace(".", "", 1).isdecimal() else -1.0
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid share: 5%, up to 100%")
    return value


def lock_time_s(text: str) -> int:
    """Parse 12h, 30d, 8w, 1y, in seconds."""
    found = duration_s(text, {**AGE_UNITS_S, "y": 365 * 86400})
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid time: 12h, 30d, 8w, 1y")
    return found


def job_id(text: str) -> bytes:
    """32 hex digits, with or without the dashes of a uuid, to 16 bytes."""
    try:
        raw = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        raw = b""
    if len(raw) != 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid uuid (32 hex digits)")
    return raw


def split_named(text: str) -> tuple[str, str]:
    """`NAME=PATH` or `PATH` to (name, path); the default name is the file's.

    Where there are several `=`, the first one before something that exists counts.
    """
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        return os.path.basename(text) or text, text
    if "://" in path and "://" not in name:
        return name, path  # a URI, which may have a path that exists behind its "="
    # A name or a path may contain "=": what exists decides.
    parts = text.split("=")
    for index in range(1, len(parts)):
        there = "=".join(parts[index:])
        if os.path.lexists(there):
            return "=".join(parts[:index]), there
    if os.path.lexists(text):
        return text, text
    if not name or not path:
        raise UsageError(f"{without_user(text)!r} is not NAME=PATH")
    return name, path


def check_endpoint(endpoint: str, *, plain_tcp: bool, keys: str | None = None) -> None:
    """Raises UsageError unless `endpoint` is one we speak over, safely."""
    if keys is not None and (plain_tcp or not endpoint.startswith("tcp://")):
        raise UsageError(
            "--keys is for tcp://, without --insecure-plain-tcp: ipc:// has its folder's rights"
        )
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        # sun_path has 108 bytes with its NUL.
        if not path or len(os.fsencode(path)) > 107:
            raise UsageError(f"{endpoint}: a socket's path has 1..107 bytes")
    elif endpoint.startswith("tcp://"):
        port = endpoint.rpartition(":")[2]
        # ZeroMQ takes larger numbers, and leaves out what does not fit.
        if port != "*" and not (port.isdecimal() and int(port) <= 65535):
            raise UsageError(f"{endpoint!r}: no port; use tcp://HOST:PORT with 1 to 65535")
        if not plain_tcp and keys is None:
            raise UsageError(
                f"{endpoint}: over TCP, anybody could read and forge the data; use --keys DIR "
                "(`vmapipe keygen` makes them), or accept the risk on a trusted network with "
                "--insecure-plain-tcp"
            )
    else:
        raise UsageError(f"{endpoint!r} is not a valid endpoint; use ipc://PATH or tcp://HOST:PORT")


def is_service(name: str) -> bool:
    """Return whether the word for an archive, or a place of archives, is a service's."""
    return name.startswith(_SERVICES)


def check_storable(name: str) -> None:
    """Raises UsageError where the word for a new archive is a service's."""
    if is_service(name):
        raise UsageError(
            f"{name} is a service, which stores what `vmapipe backup --archiver`, `vmapipe copy` and `vmapipe repack` "
            "send: here name a file, a folder or s3://"
        )


def check_readable(name: str) -> None:
    """Raises UsageError where the word for an archive, or a place of archives, is a service's."""
    if is_service(name):
        raise UsageError(
            f"{name} is a service, and nobody reads archives from one: name its folder or bucket, on its host"
        )


def add_tcp_options(parser: argparse._ActionsContainer, in_folder: str) -> None:
    """Add the options for tcp://; `in_folder` says what the folder of keys holds."""
    parser.add_argument(
        "--keys", metavar="DIR", help=f"for tcp://, encrypted: the folder with {in_folder}"
    )
    add_plain_tcp_option(parser)


def add_connect_option(parser: argparse._ActionsContainer) -> None:
    """Add the option of a process that connects to an archiver."""
    parser.add_argument(
        "--connect-timeout",
        type=wait_time,
        # A service that is being started again is back within it.
        default=5,
        metavar="SECONDS",
        help="how long an archiver at tcp:// that cannot be reached is tried before it is given "
        "up (default: 5); once connected, a lost connection has the archiver's own limit",
    )


def add_service_link_options(parser: argparse.ArgumentParser) -> None:
    """Add how a service is reached, and how fast it is sent to."""
    group = parser.add_argument_group("on the way, and into a service (tcp://HOST:PORT)")
    group.add_argument(
        "--speed",
        type=size,
        default=0,
        metavar="BYTES/S",
        help="read at most this much a second; K, M, G, T are 1024 (default: no limit)",
    )
    add_tcp_options(group, "its client's key pair, and the service's server.pub")
    add_connect_option(group)


def check_no_service_options(options: argparse.Namespace) -> None:
    """Raises UsageError for what would count for a service only."""
    if options.keys or options.insecure_plain_tcp:
        raise UsageError("--keys and --insecure-plain-tcp are for a service: tcp://HOST:PORT")


def add_plain_tcp_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--insecure-plain-tcp",
        action="store_true",
        help="allow tcp:// although whoever is on the network can then read and forge the data",
    )


def add_buffer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the room of old data while a disk is in use."""
    group = parser.add_argument_group("disks in use")
    group.add_argument(
        "--buffer",
        type=buffer_size,
        default=64 << 20,
        metavar="SIZE",
        help="memory for old data of each live disk that a slow archiver has not taken yet "
        "(8M to 192M; default: 64M)",
    )
    group.add_argument(
        "--spool",
        default="",
        metavar="DIR",
        help="use a nameless file in this folder, too, when the buffer is full (default: none)",
    )
    group.add_argument(
        "--spool-size",
        type=spool_size,
        default=4 << 30,
        metavar="SIZE",
        help="largest size of the spool file of each live disk (at most 64G; default: 4G)",
    )
    group.add_argument(
        "--guest-wait",
        type=wait_time,
        # Linux guests give a SCSI disk 30 s.
        default=20,
        metavar="SECONDS",
        help="longest time that the backup may hold back a guest's write, when buffer and spool are "
        "full; after that the backup is aborted and the write goes on (default: 20)",
    )


def add_child_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of processes that a job starts; a user never needs them."""
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)


@contextlib.contextmanager
def needing_cryptography(option: str) -> Iterator[None]:
    """Say in words where the library that `option` needs is not installed. Raises UsageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise UsageError(
            f"{option} needs the library cryptography: pip install 'vmapipe[age]', or Debian's "
            "python3-cryptography"
        ) from error


def minutes(text: str) -> int:
    """Return a number of minutes, at least 1. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdecimal() and int(text[:6]) > 0 and len(text) < 6):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes")
    return int(text)


def kib_per_s(text: str) -> int:
    """Return bytes a second, said in KiB. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdecimal() and len(text) < 13):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of KiB a second")
    return int(text) << 10
