# SPDX-License-Identifier: Apache-2.0
"""`vmapipe keygen`: key pairs for archivers and their clients."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import zmq

from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.keys import KeyPair, write_pair
from vmapipe.runtime.process import run
from vmapipe.runtime.text import one_line

DESCRIPTION = """\
Make a pair of keys, so that an archiver and its clients know each other over
TCP (docs/security.md). Secret keys never leave the host they were made on, and
are never overwritten.
"""

EPILOG = """\
example, for an archiver and one client of it:
  backup# vmapipe keygen /etc/vmapipe/keys                    # server.key, server.pub, clients/
  host1#  vmapipe keygen --client /etc/vmapipe/keys           # client.key, client.pub
  host1#  scp backup:/etc/vmapipe/keys/server.pub /etc/vmapipe/keys/
  host1#  scp /etc/vmapipe/keys/client.pub backup:/etc/vmapipe/keys/clients/host1.pub
"""


def main(argv: Sequence[str] | None = None, prog: str = "vmapipe keygen") -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument("folder", metavar="DIR", help="folder for the keys; made if need be")
    parser.add_argument(
        "--client",
        action="store_true",
        help="make the keys of a client, which sends to an archiver (default: an archiver's own)",
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _make(options.folder, client=options.client))


def _make(folder: str, *, client: bool) -> None:
    # Imported here: refused options need no ZeroMQ.

    role = "client" if client else "server"
    write_pair(folder, role, new_pair())
    print(one_line(f"{folder}/{role}.key (secret)"))
    print(one_line(f"{folder}/{role}.pub"))


if __name__ == "__main__":
    sys.exit(main())


def new_pair() -> KeyPair:
    """A pair of CURVE keys from the system's randomness."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())
