# SPDX-License-Identifier: Apache-2.0
"""Maps the memory that a producer on this host shares, if it can be trusted to stay."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import stat

# Larger than any ring of ours; a mapping costs address space only, but a
# stranger need not have more of it.
MAX_SHARED_BYTES = 256 << 20
# A descriptor of a process, and nothing else: a stranger's path must not make
# us open (and thereby wake or block on) anything.
_OFFER = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,10}")
# Without these seals the owner could cut the file, and reading the mapping
# would then kill this process.
_SEALS = fcntl.F_SEAL_SHRINK


def map_shared(offer: str) -> memoryview | None:
    """The memory file at `offer`, read-only; None when it cannot be shared.

    Not being able to is no error (another user, another pid namespace): the
    data then comes in the frames.
    """
    if not _OFFER.fullmatch(offer):
        return None
    try:
        fd = os.open(offer, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= MAX_SHARED_BYTES:
            return None
        # Only memory files have seals; any other file fails here.
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            return None
        return memoryview(mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ))
    except OSError:
        return None
    finally:
        os.close(fd)


def refuse_shared(offer: str) -> memoryview | None:
    """For producers that may be on another host."""
    return None
