# SPDX-License-Identifier: Apache-2.0
"""Reading of archives: files, pipes, commands, objects; plain or compressed; extent after extent.

Read in this order: errors.py, input.py (bytes in order, and waits that a stop ends), object.py
(objects of a store), parts.py (compressed files of independent parts), zstd.py, compressed.py
(recognition, gzip, lzo), decrypt.py (age files), source.py (opens all of them), digest.py and manifest.py, reader.py
(an archive's header), survey.py (its extents, damaged or not), slots.py (shared memory for data).

Invariants: memory is bounded whatever the file says; a cut file is never taken for a whole
one; every wait ends when a stop is asked for; an error names the file and the offset.
"""
