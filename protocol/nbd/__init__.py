# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol, client and server, as bytes and events (docs/nbd.md). Pure.

Read in this order: `constants` (numbers and limits), `session` (what is exported, requests,
what both sides have agreed on), `handshake` (options as bytes), then `client_handshake` and
`client_transfer`, or `server_handshake` and `reply`. `errors` are the protocol's own.

Invariants: lengths are checked when they are announced, before memory is taken; data may
be cut anywhere between two reads of a socket; after an error the connection must end.
"""
