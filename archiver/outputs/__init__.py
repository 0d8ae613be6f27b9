# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of an archive go.

Read in this order: base.py (what each output does, and how it ends), open.py (from
the option's text to an output), file.py, stream.py, command.py, object.py (the four
kinds), manifests.py (the digests, and where they go), cluster_digests.py (those of clusters, for the next backup),
compress.py (zstd), encrypt.py (age), sign.py (the manifest's signature).

Invariants: `commit` returns when the archive is complete at its place; `abandon` may
come from any thread, takes seconds at most, never raises and leaves nothing that
looks like an archive; no output replaces an archive; a file has the name
NAME.partial, and a lock, while it is written.
"""
