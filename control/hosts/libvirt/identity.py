# SPDX-License-Identifier: Apache-2.0
"""Who a restored domain is, and what its network cards are connected to."""

from __future__ import annotations

import contextlib
import secrets
import uuid
from typing import Any

from vmapipe.access.machine.domain import Draft, HostFacts, Identity, Network
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.runtime.errors import UsageError


def identity_of(host: Host, name: str, draft: Draft, existing: Any, *, is_same: bool) -> Identity:
    """Return the identity; `existing`: the domain that is overwritten, or None. Raises Failure."""
    macs = () if is_same else tuple(_new_mac() for _ in draft.cards)
    own = draft.uuid if is_same and draft.uuid else str(uuid.uuid4())
    if existing is not None:
        # libvirt knows a domain by its uuid: another one would be a second domain.
        return Identity(name, str(host.call(existing.UUIDString)), macs)
    with contextlib.suppress(LibvirtFailure):
        other = host.call(host.connection.lookupByUUIDString, own)
        raise UsageError(
            f"the domain {host.call(other.name)} has the uuid of the archive's: leave out "
            "--same, or --name it and --overwrite"
        )
    return Identity(name, own, macs)


def network_of(network: Network | None, facts: HostFacts, *, is_same: bool) -> Network | None:
    """Return what all cards are connected to; None: each to the network of its name. Raises UsageError.

    `network`: as it was said.
    """
    if network is None:
        return None if is_same else Network()
    if network.kind == "network" and network.name not in facts.networks:
        known = ", ".join(sorted(facts.networks)) or "none"
        raise UsageError(
            f"libvirt has no network {network.name}; it has {known}; of the host's bridges say "
            "bridge:NAME"
        )
    return network


def _new_mac() -> str:
    """A network card's address as libvirt makes them: QEMU's prefix, and chance."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
