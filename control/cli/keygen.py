# SPDX-License-Identifier: Apache-2.0
"""`vmapipe keygen`: key pairs for archivers and their clients, and keys that sign archives."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import zmq

from vmapipe.runtime.arguments import make_parser, needing_cryptography
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.keys import KeyPair, write_pair
from vmapipe.runtime.process import run
from vmapipe.runtime.side_files import open_new
from vmapipe.runtime.text import one_line

DESCRIPTION = """\
Make a pair of keys, so that an archiver and its clients know each other over
TCP (docs/security.md), or with --sign one that signs archives. Secret keys never
leave the host they were made on, and are never overwritten. Keys for encrypted
archives are age's: age-keygen makes them (docs/operations/encryption.md).
"""

EPILOG = """\
example, for an archiver and one client of it:
  backup# vmapipe keygen /etc/vmapipe/keys                    # server.key, server.pub, clients/
  host1#  vmapipe keygen --client /etc/vmapipe/keys           # client.key, client.pub
  host1#  scp backup:/etc/vmapipe/keys/server.pub /etc/vmapipe/keys/
  host1#  scp /etc/vmapipe/keys/client.pub backup:/etc/vmapipe/keys/clients/host1.pub

example, for archives that are signed (docs/operations/encryption.md):
  vmapipe keygen --sign /etc/vmapipe/sign.key
"""


def main(argv: Sequence[str] | None = None, prog: str = "vmapipe keygen") -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", help="folder for the keys; made if need be"
    )
    parser.add_argument(
        "--client",
        action="store_true",
        help="make the keys of a client, which sends to an archiver (default: an archiver's own)",
    )
    parser.add_argument(
        "--sign",
        metavar="FILE",
        help="make a key that signs archives (backup --sign FILE), an OpenSSH ed25519 one without a "
        "passphrase, and FILE.pub, by which they are checked (verify --signed-by FILE.pub)",
    )
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.sign is None):
        parser.error("say a DIR for the keys of archivers and clients, or --sign FILE")
    if options.sign is not None and options.client:
        parser.error("--client and --sign exclude each other")
    if options.sign is not None:
        return run(prog, lambda: _make_signing_key(options.sign))
    return run(prog, lambda: _make(options.folder, client=options.client))


def _make_signing_key(path: str) -> None:
    """Raises Failure: nothing is overwritten."""
    with needing_cryptography("--sign"):
        from vmapipe.crypt.keys import SshEd25519Recipient
        from vmapipe.crypt.primitives import KEY_BYTES, ed25519_public, openssh_file
    seed = os.urandom(KEY_BYTES)
    public = SshEd25519Recipient(ed25519_public(seed)).text
    if os.path.lexists(f"{path}.pub"):
        raise Failure(f"{path}.pub exists already; keys are never overwritten")
    for name, data, mode in (
        (path, openssh_file(seed), 0o600),
        (f"{path}.pub", f"{public}\n".encode(), 0o644),
    ):
        try:
            fd = open_new(name, mode)
        except FileExistsError as error:
            raise Failure(f"{name} exists already; keys are never overwritten") from error
        except OSError as error:
            raise Failure(f"cannot make the key {name}: {os_error_text(error)}") from error
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask is
            file.write(data)
            file.flush()
            os.fsync(fd)
    print(one_line(f"{path} (secret)"))
    print(one_line(f"{path}.pub"))


def _make(folder: str, *, client: bool) -> None:
    role = "client" if client else "server"
    write_pair(folder, role, new_pair())
    print(one_line(f"{folder}/{role}.key (secret)"))
    print(one_line(f"{folder}/{role}.pub"))


def new_pair() -> KeyPair:
    """Return a pair of CURVE keys from the system's randomness."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


if __name__ == "__main__":
    sys.exit(main())
