# SPDX-License-Identifier: Apache-2.0
"""Archives where they are kept, in folders and object stores: copied, repacked, put in order.

Read in this order: place.py (a folder or a bucket, with the same questions), archives.py (what belongs to an archive, and
what is known of it), listing.py and verified.py (pure: the table; what was verified when, and what is next), removal.py,
copying.py (an archive's bytes as they are stored, from place to place); then what makes archives anew: reading.py (a
sound archive, read once), ordering.py (pure: the disk's order), spool.py (where data waits for its turn), repack.py,
manifest.py; sending.py (what is in an archive, to a service).

Invariants: what arrives is what the manifest says, or nothing has the name; what stands beside an archive was
written by a stranger, and may be missing or wrong; one damaged archive ends no walk; what is locked or protected stays.
"""
