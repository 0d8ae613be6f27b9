# SPDX-License-Identifier: Apache-2.0
"""A process that gives up its rights for good, before it reads what a stranger wrote.

Afterwards it can use the descriptors that it has, memory and time, and nothing else: no
file is opened or made, no program or process started, no socket made, no other process signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct

# linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_INSTRUCTION = struct.Struct("=HBBI")
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # struct seccomp_data
# By machine: its architecture, and the calls that Python and a parser of bytes need
# (asm/unistd.h): read, write, close, lseek, poll, memory, signals' handling, futex, clocks,
# waiting, chance, messages on sockets that are there, the end.
_CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        # fmt: off
        (0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 24, 25, 28, 35, 39, 44, 45, 46, 47, 60,
         96, 131, 186, 202, 219, 228, 229, 230, 231, 262, 271, 318),
        # fmt: on
    ),
    "aarch64": (
        0xC00000B7,
        # fmt: off
        (57, 62, 63, 64, 66, 73, 79, 80, 93, 94, 98, 101, 113, 114, 115, 124, 128, 132, 134, 135,
         139, 169, 172, 178, 206, 207, 211, 212, 214, 215, 216, 222, 226, 233, 278),
        # fmt: on
    ),
}
_NOBODY = 65534


def end_with_parent() -> None:
    """Be killed when the parent ends, even where this process is stuck in a library's loop."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def give_up_rights(memory_bytes: int, cpu_s: int) -> bool:
    """No way back. Return whether the kernel holds this process to it; False: not known here.

    `memory_bytes`: of address space, and `cpu_s` of processor time, behind which it is killed.
    All that is imported later, or opened, must have been before.
    """
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
    ):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))
    if os.geteuid() == 0:
        # A container may not map that user; the filter below is what counts.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _prctl(_PR_SET_DUMPABLE, 0)
    # A change of the user clears the wish to die with the parent (prctl(2)).
    end_with_parent()
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return _filter_calls()


def _filter_calls() -> bool:
    known = _CALLS.get(platform.machine())
    if known is None:
        return False
    architecture, calls = known
    program = [
        _INSTRUCTION.pack(_LOAD, 0, 0, _ARCHITECTURE_AT),
        _INSTRUCTION.pack(_JUMP_IF_EQUAL, 1, 0, architecture),
        _INSTRUCTION.pack(_RETURN, 0, 0, _KILL),
        _INSTRUCTION.pack(_LOAD, 0, 0, _NUMBER_AT),
    ]
    for left, call in zip(range(len(calls), 0, -1), calls, strict=True):
        program.append(_INSTRUCTION.pack(_JUMP_IF_EQUAL, left, 0, call))
    program += [_INSTRUCTION.pack(_RETURN, 0, 0, what) for what in (_REFUSE, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(program), len(program) * _INSTRUCTION.size)
    # struct sock_fprog: unsigned short len, then a pointer at its own alignment.
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    try:
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(head))
    except OSError:
        return False  # a kernel without it
    return True


def _prctl(option: int, value: int, more: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(word) for word in (value, more, 0, 0)]
    if libc.prctl(ctypes.c_int(option), *words):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
