# SPDX-License-Identifier: Apache-2.0
"""Machines that run from an archive while it is restored: `vmapipe restore --live`.

Read in this order: moves.py (pure: the next commands, from what QEMU says and what was noted),
nodes.py (pure: QEMU's nodes, and the user's command line with ours in it), record.py (the note
that survives a crash), server.py (the archive's server), qemu.py (the user's QEMU), carrier.py
(who is asked, and carries out: QEMU here, libvirt in control/hosts/libvirt/), relocation.py (the
loop that looks and does), session.py (a restore from its first command to its end).

Invariants: the guest never gets an I/O error from us: where a request fails the machine stands
still; the machine depends on no process of ours but the archive's server; what the guest was told
is written stays written, whoever dies when; nothing is remembered but what is in the note.
"""
