# SPDX-License-Identifier: Apache-2.0
"""One process per device: reads it, or takes what a guest or QEMU delivers, and sends it.

Read in this order: `transmit` (the one loop, and what a Feed is), `session` (credit, frames in
flight, lost connections), `connection` (ZeroMQ), `runs` and `shared_memory` (what a frame is,
and where its data lies); then the four feeds: `disk_feed` with `source` and `image_source`,
`guard_feed` with `guard_client`, `qemu_feed` with `qemu_sink` and `chunks`, `vmstate_feed`.
`main` puts one together.

Invariants: no frame is sent beyond the archiver's credit; memory is free only when its frame is
acknowledged; a guest never waits for the archiver longer than --guest-wait; a failure is told
to the archiver, and a source that changed is never stored as if it had not.
"""
