# SPDX-License-Identifier: Apache-2.0
"""Whether KVM runs a guest here, found out by running one.

That /dev/kvm opens, and makes a virtual processor, says little: in some virtual machines each
instruction of the guest takes microseconds then, and kernels hang as they boot.
"""

from __future__ import annotations

import os

from vmapipe.access.machine.process import MachineEnded, OwnQemu, quoted
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.folders import OwnFolder

KVM, TCG = "kvm", "tcg"
#: Says which one to use, without trying.
VARIABLE = "VMAPIPE_ACCELERATOR"
# Firmware, and as many instructions as a processor does in 20 ms: 0.2 s. One that is
# emulated an instruction at a time takes a minute.
_LIMIT_S = 2.0
# A boot sector: count down from 20,000,000, then write to port 0xf4, which ends QEMU.
_SECTOR = (
    bytes.fromhex(
        "66b9002d3101"  # mov ecx, 20000000
        "6649"  # dec ecx
        "75fc"  # jnz -4
        "baf400"  # mov dx, 0xf4
        "b010"  # mov al, 0x10
        "ee"  # out dx, al
        "f4ebfd"  # hlt, for ever
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
# isa-debug-exit: twice what was written, plus one.
_DONE = 0x21
# What a probe has found, by its name.
_known: dict[str, bool] = {}


def accelerator(cancel: Cancel) -> str:
    """Return KVM, or TCG (emulation: some 10 times slower). Raises Failure, Cancelled."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted in (KVM, TCG):
        return wanted
    if wanted:
        raise UsageError(f"{VARIABLE} can be kvm or tcg, not {wanted}")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    if KVM not in _known:
        _known[KVM] = boots(KVM, cancel)
    return KVM if _known[KVM] else TCG


def boots(name: str, cancel: Cancel) -> bool:
    """Boot a guest of a few instructions; False: it did not come to its end. Raises Cancelled."""
    with OwnFolder("probe") as folder:
        disk = os.path.join(folder.path, "disk")
        with open(disk, "wb") as file:
            file.write(_SECTOR)
        words = [
            *("-machine", "pc", "-accel", name, "-m", "16", "-S"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-blockdev", f"driver=file,node-name=disk,filename={quoted(disk)}"),
            *("-device", "ide-hd,drive=disk"),
        ]
        try:
            with OwnQemu("the probe for KVM", folder, words, cancel) as machine:
                return machine.run(_LIMIT_S) == _DONE
        except MachineEnded:
            return False
