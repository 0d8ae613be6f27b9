# SPDX-License-Identifier: Apache-2.0
"""The messages between processes, and the order that they come in. Pure: bytes in, bytes out.

Read in this order: `schema` (a message type's annotations are its encoding and its checks),
`transfer` and `transfer_state` (producer and archiver), `service` (coordinator and archiver
service), `guard` (producer and guard), `restore` (reader and worker), `limits`, `errors`.
`nbd/` is the NBD protocol, `zmtp` what a ZeroMQ connection begins with.

Invariants: every size is checked before anything is unpacked; a message that a peer must
not send raises RemoteProtocolError, our own mistake LocalProtocolError; nothing here reads
a clock, opens a file or waits.
"""
