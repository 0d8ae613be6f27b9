# SPDX-License-Identifier: Apache-2.0
"""Clusters, blocks, masks and sets of clusters: what the wire and the archive format share. Pure.

Read in this order: `sizes` (the numbers, each once), `masks` (which blocks of a piece of
disk are zero; runs of set bits), `cluster_set` (which clusters of a disk are done).

Invariants: a cluster is 64 KiB, a block 4 KiB, and bit 0 of a mask is the first block of
its cluster. A mask says which blocks are *stored*: its clear bits read as zeroes. Nothing
here opens a file, reads a clock or imports from another room.
"""
