# SPDX-License-Identifier: Apache-2.0
"""The base of an incremental backup: an earlier archive, of which the unchanged clusters are taken.

Read in this order: check.py (is it one, before anything begins), choice.py (which one), source.py (its stored bytes:
a file, an object), content.py (its plain bytes, out of zstd frames or not), extents.py (its extents in order, each held
against its digest). The archive that comes of it and of what has changed:
job/fill.py, and its pure core job/synthesis.py.

Invariants: an archive without a manifest is not a base; no byte of a base is stored that its
manifest does not vouch for; a base is read, and never written.
"""
