# SPDX-License-Identifier: Apache-2.0
"""The programs inside the appliance, which run there alone.

Read in this order: volumes.py (the kernel's first process; what lies on the disks, and mounts),
tree.py (answers about a mounted tree), port.py (messages to the host).

Invariants: they import nothing but each other and the MODULES of volumes.py, and run in the Python that
runs vmapipe; what they say is checked by who hears it; no link of a file system is followed.
"""
