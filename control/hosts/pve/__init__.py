# SPDX-License-Identifier: Apache-2.0
"""Proxmox VE: a node's machines are backed up as vzdump does, from outside of its Perl

Pure: `guests.py` (which machines), `storages.py` (where their volumes are), `defaults.py` (what
/etc/vzdump.conf says), `machine.py` (what of a machine is taken). `node.py` reads a node's files, and
`lock.py` holds `lock: backup` in a configuration; whoever is killed leaves a note, so that only our
own locks are ever removed.
"""
