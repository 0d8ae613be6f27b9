# SPDX-License-Identifier: Apache-2.0
"""Removal of what restores to libvirt have made and do not need: of a failed one's, and of killed ones'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure, shown_uri
from vmapipe.control.hosts.libvirt.host_facts import paths_of
from vmapipe.control.hosts.libvirt.places import remove_made
from vmapipe.control.hosts.libvirt.undo import (
    Made,
    MadeJournal,
    abandoned,
    told_words,
)
from vmapipe.runtime.errors import Failure


def description_of(host: Host, domain: Any, *, secure: bool = False) -> str:
    """Return a domain's XML as it will be when it starts the next time; `secure`: with passwords.

    Raises LibvirtFailure.
    """
    flags = host.lib.VIR_DOMAIN_XML_SECURE if secure else 0
    return str(host.call(domain.XMLDesc, host.lib.VIR_DOMAIN_XML_INACTIVE | flags))


def paths_in_use(host: Host) -> frozenset[str]:
    """Return the disks of all domains. Raises LibvirtFailure."""
    used: set[str] = set()
    for domain in host.call(host.connection.listAllDomains):
        used |= paths_of(description_of(host, domain))
        if host.call(domain.isActive):
            # One that runs has what it was started with, whatever is defined by now.
            used |= paths_of(str(host.call(domain.XMLDesc, 0)))
    return frozenset(used)


class Removal:
    """Removes files and volumes that restores have made, if they are still those, and no domain's."""

    def __init__(self, host: Host, uri: str, notice: Callable[[str], None]) -> None:
        """`uri`: of the connection, as libvirt says it; `notice` takes a line for the user."""
        self._host, self._uri, self._notice = host, uri, notice

    def clean_up(self) -> None:
        """Remove what killed restores have left."""
        for journal in abandoned():
            with journal:
                try:
                    self._clean(journal)
                except Failure as failure:
                    self._notice(f"what a killed restore has left stays: {failure}")

    def _clean(self, journal: MadeJournal) -> None:
        """Remove what a journal tells, and then it. Raises Failure."""
        told = journal.read()
        if told.uri != self._uri:
            self._notice(
                f"a restore of {told.name} to {shown_uri(told.uri)} was killed; it has left "
                f"{told_words(told.made)}: a restore with --connect {shown_uri(told.uri)} "
                "removes it"
            )
            return
        if self._has_domain(told.uuid, told.made):
            for what in told.planned:
                self._notice(
                    f"the restore of {told.name} was killed at its very end: see whether "
                    f"{what} is there"
                )
            journal.remove()
            return
        removed = self.remove(told.made)
        for what in told.planned:
            self._notice(
                f"a restore of {told.name} was killed while libvirt made {what}: see whether "
                "it is there, and remove it if you do not know it"
            )
        if removed:
            self._notice(
                f"removed {told_words(removed)}, which a killed restore of {told.name} had left"
            )
        journal.remove()

    def _has_domain(self, domain_uuid: str, made: Sequence[Made]) -> bool:
        """Return whether the domain was defined, on what the killed restore had made."""
        try:
            domain = self._host.call(self._host.connection.lookupByUUIDString, domain_uuid)
        except LibvirtFailure as failure:
            if failure.code == self._host.lib.VIR_ERR_NO_DOMAIN:
                return False
            raise
        named = paths_of(description_of(self._host, domain))
        return any(one.path in named for one in made)

    def remove(self, made: Sequence[Made]) -> list[Made]:
        """Remove what was made, if it is still that and no domain has it; return what was. Raises Failure."""
        if not made:
            return []
        used = paths_in_use(self._host)
        removed = []
        # What is in a folder goes before it.
        for one in reversed(made):
            if one.path in used:
                self._notice(f"{one.words} is in use by a domain, and stays")
            elif remove_made(self._host, one):
                removed.append(one)
        return removed[::-1]
