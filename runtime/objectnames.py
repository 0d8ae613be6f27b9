# SPDX-License-Identifier: Apache-2.0
"""`s3://BUCKET/KEY`: which words name an object of a store, and which are refused."""

from __future__ import annotations

import re

from vmapipe.runtime.errors import UsageError

SCHEME = "s3://"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
# The limit of S3.
_MAX_KEY_BYTES = 1024


def is_object(name: str) -> bool:
    return name.startswith(SCHEME)


def split_name(name: str) -> tuple[str, str]:
    """`s3://BUCKET/KEY` to (bucket, key). Raises UsageError."""
    bucket, slash, key = name.removeprefix(SCHEME).partition("/")
    if not is_object(name) or not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{name!r}: an object's name is s3://BUCKET/KEY")
    if not slash or not key or key.endswith("/"):
        raise UsageError(f"{name!r} names no object in the bucket: use s3://BUCKET/KEY")
    # What a library or a proxy on the way may take for another object.
    if any(part in ("", ".", "..") for part in key.split("/")) or not key.isprintable():
        raise UsageError(f"{name!r}: empty, . and .. parts and control characters are refused")
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise UsageError(f"{name!r}: a key has at most {_MAX_KEY_BYTES} bytes")
    return bucket, key
