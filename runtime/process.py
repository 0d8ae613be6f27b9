# SPDX-License-Identifier: Apache-2.0
"""The frame of every process: how it starts, fails, ends, and how much CPU it may take.

A failure is one clear line and an exit code, never a traceback. `notify` tells systemd a
service's state; `lower_priority` and `yield_cpu` let guests have the processors first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import NoReturn, cast

from vmapipe.runtime.cancel import Cancel, ParentConnection
from vmapipe.runtime.errors import EXIT_FAILED, EXIT_OK, Failure, os_error_text
from vmapipe.runtime.events import Command, Emit, Event, encode_line, ignore
from vmapipe.runtime.logs import DEBUG, Trace, shown, start_logging
from vmapipe.runtime.syscalls import set_time_slice, share_one_heap
from vmapipe.runtime.text import one_line

_log = Trace(__name__)

# The next one of its kind says as much and more.
_DROPPABLE = frozenset({"progress", "buffer", "transfer", "carried"})
# With 20 libzmq aborts in the middle of a small job; 24 were enough for one disk.
_LEAST_DESCRIPTORS = 32
# A thread's stack where the limit says nothing useful: glibc's own.
_USUAL_STACK_BYTES = 8 << 20
# What a library and we ourselves take at once beside the threads' stacks: messages, buffers.
_SPARE_BYTES = 16 << 20
# Larger than any frame that we write, and below what glibc's limit may be (32 MiB).
_KEPT_BLOCK_BYTES = 24 << 20
# With less, modules of Python's print tracebacks of their own.
_LEAST_MEMORY_BYTES = 24 << 20


def failure_of(error: BaseException) -> tuple[str, int] | None:
    """Return the line and exit code of an error that a user can cause; None: a defect."""
    if isinstance(error, KeyboardInterrupt):
        return "cancelled by SIGINT", 130
    if text := _system_failure(error):
        return text, EXIT_FAILED
    code = getattr(error, "exit_code", None)
    if isinstance(error, Exception) and isinstance(code, int):
        return str(error), code
    return None


def failure_text(error: Exception) -> str:
    """Return the line for whoever waits for a thread that `error` has ended; of a defect, its kind."""
    failure = failure_of(error)
    return failure[0] if failure is not None else f"{type(error).__name__}: {error}"


def _system_failure(error: BaseException) -> str:
    """Return the sentence for what the system refuses or has run out of; empty: another error."""
    if isinstance(error, BrokenPipeError):
        return "the reader of our output has closed it"
    if isinstance(error, OSError):
        return _os_failure(error)
    # The latter is Python's where there was no memory for the error either.
    if isinstance(error, MemoryError) or "return without exception set" in str(error):
        return "out of memory (see ulimit -v, and MemoryMax= of systemd)"
    # Python has no class of its own for this.
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return (
            "no more threads can be started here (see ulimit -u and -v, and TasksMax= of systemd)"
        )
    if isinstance(error, ImportError) and _is_library(error):
        return f"a library cannot be loaded: {error} (out of memory? see ulimit -v)"
    return ""


def _os_failure(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        # Which file it was has nothing to do with it.
        return "no more files can be opened here: raise the limit (`ulimit -n`, LimitNOFILE= of a unit)"
    if error.filename:
        return f"{error.filename}: {os_error_text(error)}"
    if error.errno == errno.ENOENT and _folder_is_gone():
        return "the folder that this was started in has been removed: change to another one (cd)"
    if error.errno == errno.ENOSPC:
        # A file that has a name is named by whoever writes it; what is left has none.
        return (
            f"{os_error_text(error)}: where our output goes, or in the folder for temporary files "
            "(TMPDIR, else /tmp)"
        )
    return os_error_text(error)


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _is_library(error: ImportError) -> bool:
    """Return whether the system's loader refused, and not a name is missing in a module."""
    return ".so" in f"{error.path or ''} {error}" and not isinstance(error, ModuleNotFoundError)


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


def escape_what_cannot_be_shown() -> None:
    """Let a letter that the terminal's encoding does not have, in a name or in `--help`, end no work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def raise_descriptor_limit() -> None:
    """Let this process, and those that it starts, open as many files as it is allowed to.

    The soft limit is for programs that use select(), which we do not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A sandbox that forbids it leaves us what we have.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def forbid_core_dumps() -> None:
    """Let no core dump be made of this process: it holds a secret key from now on. Never raises."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    # One byte, not none: with that Linux does not call a collector of dumps (core_pattern) either.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (min(1, hard) if hard >= 0 else 1, hard))


def _check_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < _LEAST_DESCRIPTORS:
        raise Failure(
            f"only {hard} files may be open here, and a job needs {_LEAST_DESCRIPTORS} or more: "
            "raise the limit (`ulimit -n`, LimitNOFILE= of a unit)"
        )


def require_memory(threads: int = 2) -> None:
    """Raise Failure where a limit of address space leaves no room for ZeroMQ's threads.

    It has a worker and a reaper, and ends the process with a line of its own when it cannot start one.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    stack_bytes, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if not 0 <= stack_bytes <= _USUAL_STACK_BYTES:
        stack_bytes = _USUAL_STACK_BYTES
    with open("/proc/self/statm", encoding="ascii") as status:
        used_bytes = int(status.read().split()[0]) * resource.getpagesize()
    needed_bytes = used_bytes + threads * stack_bytes + _SPARE_BYTES
    if needed_bytes > limit:
        raise Failure(
            f"only {limit >> 20} MiB of memory may be used here, and this process needs "
            f"{-(-needed_bytes >> 20)} MiB or more: raise the limit (`ulimit -v`, LimitAS= of a unit)"
        )


def _check_memory_limit() -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < _LEAST_MEMORY_BYTES:
        raise Failure(
            f"only {limit >> 20} MiB of memory may be used here, and a command needs "
            f"{_LEAST_MEMORY_BYTES >> 20} MiB or more: raise the limit (`ulimit -v`, LimitAS= of a unit)"
        )


def leave(program: str, work: Callable[[], object]) -> NoReturn:
    """Do `work`, and end this process with the exit code that it returns, at once.

    What a limit refuses before `work` can say so itself, while modules are loaded, is one line, too.

    For processes whose children have ended and whose files are closed then:
    Skips the interpreter's shutdown, which takes about 10 % of a short run.
    """
    code: object = 1
    try:
        _check_memory_limit()
        escape_what_cannot_be_shown()
        code = work()
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001  shown as the interpreter would
        failure = failure_of(error)
        if failure is None:
            import traceback

            traceback.print_exc()
        else:
            code = failure[1]
            with contextlib.suppress(OSError):
                print(f"{program}: {one_line(failure[0])}", file=sys.stderr, flush=True)
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
    start_logging()
    escape_what_cannot_be_shown()
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
    on_command: Callable[[Command], None] = ignore,
) -> int:
    """Run one process of a job, with a parent that listens or by hand.

    With a parent its failure travels as an `error` event, so that the parent
    can say it in the job's words; by hand it goes to stderr. What the parent
    commands is given to `on_command`, in a thread of its own.
    """
    start_logging()
    cancel = Cancel()
    cancel.on_signals(has_parent=parent_fd is not None)
    if parent_fd is None:
        return run(program, lambda: work(cancel, by_hand))
    try:
        parent = ParentConnection(parent_fd, cancel, on_command)
    except RuntimeError as error:
        # There is no thread to hear it with; it can be told all the same.
        failure = failure_of(error)
        if failure is None:
            raise
        with contextlib.suppress(OSError):
            os.write(parent_fd, encode_line({"event": "error", "text": failure[0]}))
        return failure[1]

    def emit(event: Event) -> None:
        if event["event"] == "notice" or event["event"] == "draining" or event["event"] == "error":
            # It may quote a stranger at any length; a parent takes no line without an end.
            event = cast("Event", {**event, "text": one_line(event["text"])})
        if _log.has(DEBUG):
            _log.debug("%s event %s", program, shown(event))
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


@functools.cache
def program_version() -> str:
    """Return the version of the installed package, or `unknown` in a checkout without one."""
    # Imported here: it takes as long as all the rest of a start.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vmapipe")
    except PackageNotFoundError:
        return "unknown"


def keep_freed_memory() -> None:
    """Have glibc keep blocks of some MiB that are freed, for the next ones of that size.

    By default it gives those above 128 KiB back to the kernel at once, and each that is taken again costs a
    fault a page: decompressing frames of 3.6 MiB took 10.7 ms each with that, and 3.9 without.
    It raises its limit to what was freed, once (mallopt(3), M_MMAP_THRESHOLD). And have all threads share one
    heap: what is freed in one of their own goes back to the kernel sooner, and fits the next block less often. A random
    read of a .zst archive took 116 faults with theirs, and 10 without, and a server 380 MiB in place of 200.
    """
    share_one_heap()
    block = bytes(_KEPT_BLOCK_BYTES)
    del block


def notify(*lines: str) -> None:
    """Send `READY=1`, `STOPPING=1`, `STATUS=...` to systemd, sd_notify(3). Never fails.

    Does nothing where NOTIFY_SOCKET is not set.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.send("\n".join(lines).encode())
    except OSError:
        pass  # the socket is gone or full: our work goes on


# A third of a guest's share where there is not enough for both. Not less: a guest
# may wait for what a backup has begun. With four busy loops on two processors, a
# guest that writes as fast as it can had 3500 writes a second without this, 2000
# with 5, 1000 with 10; without the loops 5 and 10 helped alike.
_NICE = 5
# The shortest that Linux takes. A thread that wakes up waits for the rest of the slice
# of the running one: with the usual 1 to 3 ms that was the p99 of a guest's writes.
_SLICE_NS = 100_000


def lower_priority() -> None:
    """Let other processes go first; for this thread and those that it will start."""
    # A process that is as low already, or a container that forbids it, is not an error.
    with contextlib.suppress(OSError):
        nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        # Batch: does not interrupt the running thread when it wakes up.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        set_time_slice(os.SCHED_BATCH, nice, _SLICE_NS)


#: Let a thread that waits for this processor run now. For between two pieces of work.
#: It would wait for the scheduler's next tick, up to 4 ms, however little we had to do and however
#: nice we are: the p99 of a guest's writes was that.
yield_cpu: Callable[[], None] = os.sched_yield
