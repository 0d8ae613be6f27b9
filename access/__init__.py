# SPDX-License-Identifier: Apache-2.0
"""Archives that are used without being restored: `vmapipe serve`, and what stands on it (mount, files, drill).

Read in this order: index.py (pure: where each cluster is stored), kept_index.py (kept for the next time), storage.py
(an archive's plain bytes at any place), frames.py and lzo.py (the same of compressed ones), archive.py (an open
archive: its index, and its extents checked when they are first touched), disk.py
(a device as an NBD export, read-only), overlay.py (the same with writes kept in
a file beside it), serve.py (the exports of several archives). Then the folders: files/, mount/, machine/, drill/, live/.

Invariants: an archive is opened once, so that removing or replacing it does no harm; a
byte that could not be proved, or that is damaged, is an I/O error and never other
data; memory does not depend on the size of a disk, but on how often its data changes
place in the archive.
"""
