# SPDX-License-Identifier: Apache-2.0
"""What can be backed up here, and how: `vmapipe doctor`, which changes nothing

Read in this order: `findings` (what is told, pure), `releases` (QEMU's known faults, pure),
`running_qemu` (a QEMU by its monitor), `this_host` (programs, libraries, rights), `domains` (libvirt) and
`guests` (Proxmox VE). The disks are chosen by the same code as a backup's. To QEMU go
commands that only read, and nothing else: `ReadOnlyQmp` sends no other.
"""
