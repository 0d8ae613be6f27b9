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
# What it may write into files that are open: its last words, no more.
_FILE_BYTES = 64 << 10
# By machine: linux/audit.h's number, and the column of the table below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# What Python and a parser of bytes need, by its numbers on both (asm/unistd.h): descriptors
# that are there, memory, signals that come, threads that wait, clocks, chance, the end.
_CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "writev": (20, 66),
    "close": (3, 57),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "ppoll": (271, 73),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
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
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
    ):
        _, most = resource.getrlimit(limit)
        allowed = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (allowed, allowed))
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


def can_filter() -> bool:
    """Return whether this kernel and processor hold a process to `give_up_rights`, as far as they say."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return platform.machine() in _MACHINES and any(line.startswith("Seccomp:") for line in file)


def _filter_calls() -> bool:
    known = _MACHINES.get(platform.machine())
    if known is None:
        return False
    architecture, column = known
    calls = [numbers[column] for numbers in _CALLS.values()]
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
