# SPDX-License-Identifier: Apache-2.0
"""The frame of every process of ours: one clear line and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import sys
from collections.abc import Callable
from typing import NoReturn

from vmapipe.runtime.cancel import Cancel, Parent
from vmapipe.runtime.errors import EXIT_FAILED, EXIT_OK, Failure, os_error_text
from vmapipe.runtime.events import Emit, Event, encode_line, ignore
from vmapipe.runtime.texts import one_line

# The next one of its kind says as much and more.
_DROPPABLE = frozenset({"progress", "buffer", "transfer"})
# With 20 libzmq aborts in the middle of a small job; 24 were enough for one disk.
_LEAST_DESCRIPTORS = 32
# Their text is for people.
_WORDED = frozenset({"notice", "draining", "error"})


def failure_of(error: BaseException) -> tuple[str, int] | None:
    """The line and exit code for an error a user can cause; None: it is a defect of ours."""
    if isinstance(error, KeyboardInterrupt):
        return "cancelled by SIGINT", 130
    if text := _system_failure(error):
        return text, EXIT_FAILED
    code = getattr(error, "exit_code", None)
    if isinstance(error, Exception) and isinstance(code, int):
        return str(error), code
    return None


def _system_failure(error: BaseException) -> str:
    """What the system refuses, or has no more of; else nothing."""
    if isinstance(error, BrokenPipeError):
        return "whoever read our output has closed it"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{os_error_text(error)}"
    if isinstance(error, MemoryError):
        return "out of memory (see ulimit -v, and MemoryMax= of systemd)"
    # Python has no class of its own for this.
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "no more threads can be started here (see ulimit -u, and TasksMax= of systemd)"
    return ""


def keep_standard_descriptors() -> None:
    """Call it first: with 0, 1 or 2 closed, something we open would take that number.

    What takes it instead can be neither read nor written, so that an archive
    that was to go there fails; our words go nowhere.
    """
    for fd, wrong_way in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, wrong_way), True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for good
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for good


def raise_descriptor_limit() -> None:
    """Let this process, and those that it starts, open as many files as it is allowed to.

    The soft limit is for programs that use select(), which we do not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A sandbox that forbids it leaves us what we have.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < _LEAST_DESCRIPTORS:
        raise Failure(
            f"only {hard} files may be open here, and a job needs {_LEAST_DESCRIPTORS} or more: "
            "raise the limit (`ulimit -n`, LimitNOFILE= of a unit)"
        )


def leave(work: Callable[[], object]) -> NoReturn:
    """Do `work`, and end this process with the exit code that it returns, at once.

    For processes whose children have ended and whose files are closed then:
    Python would take all modules apart first, for a tenth of the time of a start.
    """
    code: object = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  shown as the interpreter would
        import traceback

        traceback.print_exc()
    finally:
        status = code if isinstance(code, int) else int(code is not None)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = status or EXIT_FAILED
        os._exit(status)


def run(program: str, work: Callable[[], None]) -> int:
    """Run `work`; print the line for what went wrong to stderr; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that a terminal's encoding does not have must not end the work.
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_descriptor_limit()
        work()
        sys.stdout.flush()
    except BaseException as error:
        failure = failure_of(error)
        if failure is None:
            raise
        text, code = failure
        with contextlib.suppress(OSError):
            print(f"{program}: {one_line(text)}", file=sys.stderr, flush=True)
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more at its end, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return code
    return EXIT_OK


def run_child(
    program: str,
    parent_fd: int | None,
    work: Callable[[Cancel, Emit], None],
    by_hand: Emit,
    hear: Callable[[Event], None] = ignore,
) -> int:
    """Run one process of a job, with a parent that listens or by hand.

    With a parent its failure travels as an `error` event, so that the parent
    can say it in the job's words; by hand it goes to stderr. What the parent
    orders is given to `hear`, in a thread of its own.
    """
    cancel = Cancel()
    cancel.on_signals(has_parent=parent_fd is not None)
    if parent_fd is None:
        return run(program, lambda: work(cancel, by_hand))
    parent = Parent(parent_fd, cancel, hear)

    def emit(event: Event) -> None:
        if event["event"] in _WORDED:
            # It may quote a stranger at any length; a parent takes no line without an end.
            event = {**event, "text": one_line(str(event["text"]))}
        parent.send(encode_line(event), droppable=event["event"] in _DROPPABLE)

    try:
        work(cancel, emit)
    except BaseException as error:
        failure = failure_of(error)
        if failure is None:
            raise
        emit({"event": "error", "text": failure[0]})
        return failure[1]
    return EXIT_OK


def program_version() -> str:
    """Return the version of the installed package, or `unknown` in a checkout without one."""
    # Imported here: it takes as long as all the rest of a start.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vmapipe")
    except PackageNotFoundError:
        return "unknown"
