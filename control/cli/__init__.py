# SPDX-License-Identifier: Apache-2.0
"""The commands of `vmapipe`, and the tool `vma`; control/main.py finds them in its table.

Read in this order: backup_arguments.py and backup.py, restore.py, inspect.py (verify,
list, config) with places.py (of folders and buckets), running.py (status, speed, cancel), prune.py with its rules in
retention.py (pure), copy.py, repack.py, report.py, fleet.py; serve.py, monitor.py, cleanup.py, keygen.py; identity.py
(keys of who reads) and backup_sealing.py (of who writes); vma.py with
vma_create.py and vma_read.py for the reference tool's grammar. errors.py words errors.

Invariants: a file parses, checks and reports; the work is done in the rooms below.
Wrong use exits 2 before anything is opened; an error is one line, never a traceback.
"""
