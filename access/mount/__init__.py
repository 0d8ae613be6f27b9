# SPDX-License-Identifier: Apache-2.0
"""An archive as a folder: `vmapipe mount`.

Read in this order: guest.py (the file systems of one disk, asked of their parser),
tree.py (all that the folder shows, by path), fuse.py (the same for the kernel, by libfuse).

Invariants: nothing can be written; a path of the archive is looked up in the archive only, and
no link of it is followed here; damage is an I/O error with a line that says where; what is
remembered of file systems is bounded.
"""
