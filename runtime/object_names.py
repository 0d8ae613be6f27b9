# SPDX-License-Identifier: Apache-2.0
"""Names of objects in an S3 store, `s3://BUCKET/KEY`: what is one, and its parts. Pure."""

from __future__ import annotations

import re

from vmapipe.runtime.errors import UsageError

SCHEME = "s3://"
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]"
# The limit of S3.
_MAX_KEY_BYTES = 1024


def is_object(name: str) -> bool:
    return name.startswith(SCHEME)


def split_name(name: str) -> tuple[str, str]:
    """`s3://BUCKET/KEY` to (bucket, key). Raises UsageError."""
    bucket, key = _split(name, "KEY")
    if not key or key.endswith("/"):
        raise UsageError(f"{name!r} names no object in the bucket: use s3://BUCKET/KEY")
    _check_key(name, key, _MAX_KEY_BYTES)
    return bucket, key


def check_prefix(name: str, longest_rest_bytes: int) -> None:
    """Check that objects can be named `s3://BUCKET/PREFIX/...` or `s3://BUCKET/...`. Raises UsageError.

    `longest_rest_bytes`: what may follow the prefix.
    """
    _, prefix = _split(name, "PREFIX")
    if prefix.rstrip("/"):
        _check_key(name, prefix.removesuffix("/"), _MAX_KEY_BYTES - longest_rest_bytes)


def _split(name: str, what: str) -> tuple[str, str]:
    bucket, _, key = name.removeprefix(SCHEME).partition("/")
    if not is_object(name) or not bucket:
        raise UsageError(f"{name!r} names no bucket: use s3://BUCKET/{what}")
    if not re.fullmatch(_BUCKET, bucket):
        raise UsageError(
            f"{name!r}: {bucket!r} is not a valid bucket name: that has 3 to 255 letters, digits, dots, "
            "dashes and underscores, and begins and ends with a letter or digit"
        )
    return bucket, key


def _check_key(name: str, key: str, most_bytes: int) -> None:
    # What a library or a proxy on the way may take for another object.
    if any(part in ("", ".", "..") for part in key.split("/")) or not key.isprintable():
        raise UsageError(f"{name!r}: empty, . and .. parts and control characters are refused")
    if len(key.encode()) > most_bytes:
        raise UsageError(f"{name!r}: behind the bucket there may be at most {most_bytes} bytes")
