# SPDX-License-Identifier: Apache-2.0
"""A manifest's signature, which stands beside it. Loaded only where somebody signs."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from vmapipe.archiver.outputs.manifests import ManifestSink
from vmapipe.crypt.primitives import read_openssh_seed
from vmapipe.crypt.sshsig import sign
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.keys import read_regular
from vmapipe.runtime.process import forbid_core_dumps

# An ed25519 key's file takes some 400 bytes.
_MAX_KEY_BYTES = 16 << 10


def read_signing_key(path: str) -> bytes:
    """Return the seed of the ed25519 key in OpenSSH's file `path`. Raises UsageError."""
    forbid_core_dumps()
    try:
        raw, status = read_regular(Path(path), _MAX_KEY_BYTES)
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise UsageError(
                f"--sign {path}: other users can read or change this secret key (mode "
                f"{stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}): whoever has read it can "
                "sign; make a new one: vmapipe keygen --sign FILE"
            )
        return read_openssh_seed(raw)
    except OSError as error:
        raise UsageError(f"--sign {path}: {os_error_text(error)}") from error
    except ValueError as error:
        raise UsageError(f"--sign {path}: {error}") from error


class SignedManifest:
    """Passes a manifest's lines on to `inner`, and a signature over them to `beside`, which is committed first."""

    def __init__(
        self, inner: ManifestSink, open_beside: Callable[[], ManifestSink], seed: bytes
    ) -> None:
        """Raises Failure; `inner` is then given up."""
        self._inner = inner
        self._seed = seed
        self._hash = hashlib.sha512()
        try:
            self._beside = open_beside()
        except BaseException:
            inner.abandon()
            raise

    def line(self, text: str) -> None:
        self._hash.update(text.encode())
        self._inner.line(text)

    def commit(self) -> None:
        self._beside.line(sign(self._seed, self._hash.digest()))
        self._beside.commit()
        self._inner.commit()

    def abandon(self) -> None:
        self._inner.abandon()
        self._beside.abandon()
