# SPDX-License-Identifier: Apache-2.0
"""Files and folders of the file systems in an archive: `vmapipe files`.

Read in this order: messages.py (what parser and asker say to each other), ext.py (pure: the
journal of ext3 and ext4 replayed, and what their inodes hold), parser.py (partitions and file
systems, by The Sleuth Kit), child.py (the process that it runs in), session.py (the asking
side, which answers the parser's reads), appliance.py (the other engine: a virtual machine that mounts
file systems, put together by appliance_image.py of the programs in inside/), engines.py (which of
both reads what), copies.py (what becomes of the answers here: a tar
stream or files below a folder).

Invariants: the parser is C code that reads what a stranger wrote, so it runs in a process
that can open, connect to and start nothing, and the kernel in a machine without a network; names are bytes everywhere; what a file
system's log makes untrue is replayed in memory, or it is said that it was not; no name from an
archive decides where a file is written.
"""
