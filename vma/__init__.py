# SPDX-License-Identifier: Apache-2.0
"""The VMA archive format, both directions (docs/vma-format.md). Pure: bytes in, bytes or events out.

Read in this order: `layout` (sizes and positions), `header`, `extent`, then `packer` to write
and `scanner` to read; `coverage` (is each cluster there exactly once?), `manifest` and
`seektable` (the files beside and behind an archive), `foreign` (what else a file may be),
`names`, `errors`.

Invariants: what is written is byte for byte what the reference tool writes; no field is
believed before its checksum or range was checked; errors hold device, cluster and offset.
"""
