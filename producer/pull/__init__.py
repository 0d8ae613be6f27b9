# SPDX-License-Identifier: Apache-2.0
"""The connections to an NBD export that is pulled: URIs, TLS, many requests under way, reconnects.

`export.py` opens one connection; `connection.py` is one, and `connections.py` all of them, with what is
under way; `shared_queue.py` has a qemu-storage-daemon of ours read into our own memory instead. What is asked for, and what becomes of it, is decided by `producer/pull_plan.py` (pure) and
`producer/pull_reader.py`.
"""
