# SPDX-License-Identifier: Apache-2.0
"""The worker processes of a restore: what they are given, and how they write it.

Read in this order: work.py (pure: pieces of work and their order), sockets.py (ZeroMQ), pool.py
(the reader's side: gives work, waits, ends the workers), worker.py (a worker process),
writer.py (files, block devices, and images through qemu-storage-daemon).

Invariants: each cluster is written once, in any order; what is under way is bounded; the
first failure of a worker ends the restore; a worker whose reader has died removes its files.
"""
