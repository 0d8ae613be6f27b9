# SPDX-License-Identifier: Apache-2.0
"""`vmapipe monitor`: a QMP server that serves disks to guests, or stands beside a QEMU, and backs up.

Read in this order: `commands` (the QMP commands, and the loop), `disks` (the two kinds of
disks), `guards` (the processes that serve disks to guests), `backups` (the state of its backups, pure)
and `backup_runner` (their processes), `hmp`, `fdsets`; `client` is what a backup asks of a monitor.

Invariants: the process that owns the guards reads and writes no disk and runs no backup; it never waits
for a client, a backup or QEMU; a guard that dies is started again at the same socket.
"""
