# SPDX-License-Identifier: Apache-2.0
"""An NBD server for any `Backend`, with threads: guests, QEMU's backup jobs, other clients.

Read in this order: `backend` (what a disk has to do), `server` (sockets, clients, the end),
`connection` (one client: requests and answers), `workers` (threads, and the memory that all
connections share). The protocol itself is pure and lies in `vmapipe.protocol.nbd`.

Invariants: what a client sends costs bounded memory and time; a request that may wait never
delays one that need not; a stranger cannot keep a guest from its disk.
"""
