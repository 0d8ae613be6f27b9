# SPDX-License-Identifier: Apache-2.0
"""The options that name a QEMU's monitor, wherever one is asked for."""

from __future__ import annotations

import argparse


def add_monitor_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, required: bool = False, help: str
) -> None:
    parser.add_argument(
        "--qmp",
        required=required,
        metavar="SOCKET",
        help=f"{help}: its Unix socket, or tcp:HOST:PORT (QEMU: -qmp)",
    )
    parser.add_argument(
        "--qmp-share",
        action="store_true",
        help="connect to it for the moment of each command only, so that others who do the same are "
        "served; where it is the machine's only monitor",
    )
