# SPDX-License-Identifier: Apache-2.0
"""Restores and checks of archives.

Read in this order: archive/ (how an archive is read), verify/ (what is checked of it), targets/
(where its disks go), workers/ (the processes that write them), job.py (one restore, which
brings them together). Each folder imports only from those before it; `make lint` checks that.

Invariants: nothing is published of an archive that is damaged, unless only whole disks were
chosen or a salvage was asked for; a restore that fails leaves no new file, or one
that the next restore can go on with (`--resume`); memory does not depend on the archive's size.
"""
