# SPDX-License-Identifier: Apache-2.0
"""The programs inside the appliance, which run there alone.

Read in this order: start.py (the kernel's first process), volumes.py (what lies on the disks, and
mounts), tree.py (answers about a mounted tree), port.py (messages to the host).

Invariants: they import nothing but each other and what start.py names, and run in the Python that
runs vmapipe; what they say is checked by who hears it; no link of a file system is followed.
"""
