# SPDX-License-Identifier: Apache-2.0
"""Encryption with age and signatures: what an archive at rest is protected by. Pure: bytes in, bytes out.

Read in this order: primitives.py (the library, and nothing else of it), age.py (the file format: header and chunks of
64 KiB), keys.py (recipients and identities as people write them), sshsig.py (signatures), magic.py (how to tell an
encrypted file without loading the library).

Invariants: a chunk is given out only when its tag was right and its place is the one asked for; limits come before any
work on a stranger's header; whoever writes holds public keys only.
"""
