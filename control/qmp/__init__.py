# SPDX-License-Identifier: Apache-2.0
"""QMP, the protocol of QEMU's monitor: the client for QEMU, and the server of our own sockets.

Read in this order: `connection` (commands, errors, what a connection can do), `addresses`, `reader`
(bytes to JSON objects) and `answers` (the shapes of what QEMU answers), both pure, `client`; then the
server's side: `server` (one conversation, pure), `clients` (all that are connected), `sockets`.

Invariants: nothing here knows a backup or a disk. Whatever a peer sends is bounded in bytes, values
and depth before it is decoded, and checked before it is used; every wait of the client has an end,
and the server never waits for a client. Imports nothing from the folders above.
"""
