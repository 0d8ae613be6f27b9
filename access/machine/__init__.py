# SPDX-License-Identifier: Apache-2.0
"""Stock QEMUs that vmapipe starts itself, for what an archive holds.

Read in this order: process.py (a QEMU, and an end to it), accelerator.py (whether KVM
really runs a guest here); for the machine that an archive is of: spec.py (its description), proxmox.py and
libvirt.py (made of a configuration), argv.py (QEMU's words for it), firmware.py (and the TPM).

Invariants: the guest and its disks are a stranger's; QEMU has no configuration but the words that
it is given, may start nothing, and ends with the process that started it, however that ends.
"""
