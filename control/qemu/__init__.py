# SPDX-License-Identifier: Apache-2.0
"""A running QEMU during a backup: what is put into it, watched, and taken out again.

Read in this order: `disks` and `graph` (which disks, pure), `features`, `jobs` (the commands that begin
a backup, and those that undo one; pure), `machine` (all of one backup, first to last), `cbw_filters`,
`vmstate` with `vmstate_commands` (the memory), `guest_latency` (what the guest feels meanwhile), `tpm`, `guest_agent`, `poweroff`; then what happens when
something dies: `guardian`, `drop_targets`, `undo`, `leftovers`.

Invariants: no guest's write ever fails or hangs because of a backup. Whatever we put into QEMU has a
name that begins with `vmapipe-`, so what has to be undone is seen in QEMU's answers, not remembered.
The guardian starts before QEMU is touched and outlives every other process of the backup.
"""
