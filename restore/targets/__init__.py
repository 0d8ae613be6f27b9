# SPDX-License-Identifier: Apache-2.0
"""Targets of a restore: new files, existing files, block devices, images.

Read in this order: plan.py (pure: which device goes where), map_file.py (pure: the
reference tool's map), files.py (new files, configs, existing files and block devices),
image.py (formats other than raw), resume.py (restores that can go on), targets.py (all
targets of a restore, opened together).

Invariants: all targets are opened and checked before anything is written; a new file has
its name only when all is complete; an existing target is locked, and not in use.
"""
