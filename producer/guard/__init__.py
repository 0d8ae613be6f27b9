# SPDX-License-Identifier: Apache-2.0
"""The guard: serves a disk to a guest and saves old data before its writes.

Read in this order: `copy_before_write` (pure: what is copied, and what waits for what), `backup`
(one backup: slots for old data, and the limits of waiting), `disk` (reads and writes of the
guest), `control_socket` and `peer` (backup processes and coordinators), `image`, `main`.

Invariants: a guest's write never fails because of a backup, and waits for one no longer than
--guest-wait; old data is saved before it is overwritten, or the backup ends; the instant is the
same for all disks whose writes a coordinator holds.
"""
