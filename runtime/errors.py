# SPDX-License-Identifier: Apache-2.0
"""Failures that end a process, each with its exit code (docs/operations/reports.md)."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DAMAGED = 4


class Failure(Exception):
    """The work cannot be done; the text is the one line the user sees."""

    exit_code = EXIT_FAILED


class DoubtfulBase(Failure):
    """The base of an incremental backup cannot be trusted after all: a full backup would do."""


class UsageError(Failure):
    """The command line asks for something that makes no sense."""

    exit_code = EXIT_USAGE


class Damaged(Failure):
    """Verification found damage."""

    exit_code = EXIT_DAMAGED


class Cancelled(Failure):
    """The user or the parent process ended the work; `signum` is 0 when no signal did."""

    def __init__(self, text: str, signum: int = 0) -> None:
        super().__init__(text)
        self.exit_code = 128 + signum if signum else EXIT_FAILED


def os_error_text(error: OSError) -> str:
    """`strerror` without the errno and file name that str() adds; ours are in the sentence."""
    return error.strerror or str(error)
