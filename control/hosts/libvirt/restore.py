# SPDX-License-Identifier: Apache-2.0
"""A restore to libvirt: places for the disks, their content, and at the end the domain.

The domain is defined last, in one step of libvirt's: until then nothing that was there before has
changed, and all that was made is removed where anything fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from vmapipe.access.machine.domain import (
    DomainText,
    Draft,
    HostFacts,
    Identity,
    Network,
    domain_xml,
)
from vmapipe.access.machine.firmware import Firmware, find_firmware
from vmapipe.access.machine.spec import Omission
from vmapipe.control.hosts.libvirt.abilities import check_domain, facts_of, user_at
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure, is_remote, shown_uri
from vmapipe.control.hosts.libvirt.host_facts import QemuUser, paths_of
from vmapipe.control.hosts.libvirt.places import (
    ChosenPlace,
    FolderPlace,
    Occupied,
    Place,
    PoolPlace,
    Wanted,
)
from vmapipe.control.hosts.libvirt.removal import Removal, description_of, paths_in_use
from vmapipe.control.hosts.libvirt.tpm_state import put_state, read_state, tpm_folder
from vmapipe.control.hosts.libvirt.undo import Made, MadeJournal
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.job import Options, restore
from vmapipe.restore.targets.files import Folders
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec, device_named
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import HeldFolder, OwnFolder
from vmapipe.runtime.text import one_line

_USUAL_POOL = "default"
# systemd starts a daemon again within seconds, and then it reads all its domains.
_DAEMON_S = 60.0
_RETRY_S = 0.5


class DefineRequest(NamedTuple):
    """What a user asks for.

    `archive`: as it was named; `uri`, `name`, `pool`, `folder`, `image_format`: empty: the usual
    one. `network`: None: not said. `restore`: of the restore of the disks.
    """

    archive: str
    uri: str
    name: str
    pool: str
    folder: str
    image_format: str
    is_same: bool
    overwrite: bool
    start: bool
    network: Network | None
    restore: Options


class DomainRestore:
    """One restore to libvirt. A context manager, which closes the connection."""

    def __init__(self, request: DefineRequest, emit: Emit, cancel: Cancel) -> None:
        """Connect. Raises Failure."""
        self._request, self._emit, self._cancel = request, emit, cancel
        if is_remote(request.uri):
            raise UsageError(
                f"{shown_uri(request.uri)} is another host's libvirt: run this on that host, where "
                "its disks are"
            )
        self._host = Host(request.uri)
        try:
            self._uri = str(self._host.call(self._host.connection.getURI))
            if is_remote(self._uri):
                raise UsageError(
                    f"{shown_uri(self._uri)} is another host's libvirt: run this on that host"
                )
            self._capabilities = str(self._host.call(self._host.connection.getCapabilities))
        except BaseException:
            self._host.close()
            raise
        self._removal = Removal(self._host, self._uri, self._notice)
        self._old: list[tuple[Place, Occupied]] = []
        self._stays: list[str] = []
        self._user = user_at(self._capabilities, self._uri)
        self._tpm_folder = tpm_folder(self._uri, self._user)
        self._tpm_state, self._tpm_trouble = b"", ""

    def __enter__(self) -> DomainRestore:
        return self

    def __exit__(self, *exc: object) -> None:
        self._host.close()

    def run(self, archive: Archive, draft: Draft) -> None:
        """Restore and define. Raises Failure; then nothing is left, but for what its text says."""
        self._removal.clean_up()
        name = self._request.name or draft.name
        if not name:
            raise UsageError("the archive's configuration has no name for the domain: say --name")
        existing = self._existing(name)
        identity = self._identity(name, draft, existing)
        facts = facts_of(self._host, self._capabilities, draft, self._cancel)
        network = self._network(facts)
        firmware = None
        if draft.firmware.kind == "uefi":
            firmware = find_firmware(draft.firmware, is_q35=draft.is_q35)
        place = self._place()
        with MadeJournal.new(self._uri, name, identity.uuid, self._request.archive) as journal:
            try:
                chosen, variables = self._make_room(archive, draft, name, place, journal, firmware)
                self._check_old(name, existing, place, chosen)
                finished = domain_xml(
                    draft,
                    identity,
                    {key: one.placement for key, one in chosen.items()},
                    facts,
                    network,
                    firmware,
                    variables.path if variables is not None else "",
                )
                # What libvirt does not take is better known now than when all is restored.
                check_domain(self._host, finished.xml)
                self._restore(archive, draft, chosen, variables, journal)
                self._connect_again(place)
                place.settle()
                self._cancel.check()
                # A restore takes hours: somebody may have made it, or started it, meanwhile.
                self._existing(name)
                if self._tpm_state:
                    journal.plan(f"the state of {name}'s TPM")
                domain = self._define(finished)
            except BaseException:
                self._undo(journal)
                raise
            self._put_tpm_state(draft, identity)
            journal.remove()
        self._tell(archive, draft, identity, chosen, finished)
        if existing is not None:
            self._drop_checkpoints(domain)
        self._remove_old()
        if self._request.start:
            self._start(domain, name)

    # --- Before anything is made ---

    def _lookup(self, name: str) -> Any:
        """Return the domain of a name; None: there is none."""
        try:
            return self._host.call(self._host.connection.lookupByName, name)
        except LibvirtFailure as failure:
            if failure.code != self._host.lib.VIR_ERR_NO_DOMAIN:
                raise
            return None

    def _existing(self, name: str) -> Any:
        """Return the domain that is to be overwritten; None: there is none. Raises Failure."""
        domain = self._lookup(name)
        if domain is None:
            return None
        if not self._request.overwrite:
            raise UsageError(
                f"libvirt has a domain {name} already, which is not touched: --name another, or "
                "--overwrite"
            )
        call = self._host.call
        if call(domain.isActive):
            raise Failure(f"the domain {name} is running: `virsh shutdown {name}` first")
        if call(domain.hasManagedSaveImage):
            raise Failure(
                f"the domain {name} has a saved memory, which would go on with other disks: `virsh "
                f"managedsave-remove {name}` first"
            )
        if call(domain.snapshotNum):
            raise Failure(
                f"the domain {name} has snapshots, which are of its old disks: remove them first "
                f"(`virsh snapshot-list {name}`), or --name another"
            )
        return domain

    def _identity(self, name: str, draft: Draft, existing: Any) -> Identity:
        macs = () if self._request.is_same else tuple(_new_mac() for _ in draft.cards)
        own = draft.uuid if self._request.is_same and draft.uuid else str(uuid.uuid4())
        if existing is not None:
            # libvirt knows a domain by its uuid: another one would be a second domain.
            return Identity(name, str(self._host.call(existing.UUIDString)), macs)
        with contextlib.suppress(LibvirtFailure):
            other = self._host.call(self._host.connection.lookupByUUIDString, own)
            raise UsageError(
                f"the domain {self._host.call(other.name)} has the uuid of the archive's: leave out "
                "--same, or --name it and --overwrite"
            )
        return Identity(name, own, macs)

    def _network(self, facts: HostFacts) -> Network | None:
        network = self._request.network
        if network is None:
            return None if self._request.is_same else Network()
        if network.kind == "network" and network.name not in facts.networks:
            known = ", ".join(sorted(facts.networks)) or "none"
            raise UsageError(
                f"libvirt has no network {network.name}; it has {known}; of the host's bridges say "
                "bridge:NAME"
            )
        return network

    def _place(self) -> Place:
        if self._request.folder:
            return FolderPlace(self._request.folder, self._user)
        return PoolPlace(self._host, self._request.pool or _USUAL_POOL, self._user)

    # --- Disks ---

    def _make_room(
        self,
        archive: Archive,
        draft: Draft,
        name: str,
        place: Place,
        journal: MadeJournal,
        firmware: Firmware | None,
    ) -> tuple[dict[str, ChosenPlace], TargetSpec | None]:
        """Return places by the disks' names, and the target for firmware's variables."""
        request = self._request
        chosen: dict[str, ChosenPlace] = {}
        for disk in draft.disks:
            if not disk.source:
                continue
            self._cancel.check()
            size_bytes = device_named(archive.header, disk.source).size_bytes
            is_drive = disk.element.get("device") == "cdrom"
            image_format = request.image_format or place.usual_format
            wanted = Wanted(f"{name}-{disk.key}", size_bytes, "raw" if is_drive else image_format)
            chosen[disk.key] = place.choose(wanted, journal, overwrite=request.overwrite)
            if (old := chosen[disk.key].old) is not None:
                self._old.append((place, old))
        if firmware is None or not draft.firmware.variables:
            return chosen, None
        files = FolderPlace(place.folder(), None)
        path, old = files.free(f"{name}_VARS.fd", overwrite=request.overwrite)
        if old is not None:
            self._old.append((files, old))
        self._variables_bytes = firmware.variables_bytes
        return chosen, TargetSpec(path, Kind.NEW)

    def _check_old(
        self, name: str, existing: Any, place: Place, chosen: Mapping[str, ChosenPlace]
    ) -> None:
        """See what an overwritten domain's disks are. Raises UsageError: another domain uses one."""
        known = {old.path for _, old in self._old}
        old_paths = paths_of(description_of(self._host, existing)) if existing is not None else ()
        names = "|".join(map(re.escape, chosen))
        ours = re.compile(rf"{re.escape(name)}-(?:{names})(?:-\d+)?(?:\.raw|\.qcow2)?")
        for path in sorted(set(old_paths) - known):
            found = place.find(path) if ours.fullmatch(os.path.basename(path)) else None
            if found is not None:
                self._old.append((place, found))
            elif os.path.exists(path):
                self._stays.append(path)
        if not self._old:
            return
        paths = {old.path for _, old in self._old}
        for domain in self._host.call(self._host.connection.listAllDomains):
            other = domain.name()
            used = paths & paths_of(description_of(self._host, domain))
            if used and other != name:
                raise UsageError(
                    f"{sorted(used)[0]} is a disk of the domain {other}, and is not overwritten: "
                    "--name another"
                )

    def _restore(
        self,
        archive: Archive,
        draft: Draft,
        chosen: Mapping[str, ChosenPlace],
        variables: TargetSpec | None,
        journal: MadeJournal,
    ) -> None:
        targets: dict[int, TargetSpec] = {}
        for key, source in draft.sources.items():
            targets[device_named(archive.header, source).dev_id] = chosen[key].target
        variables_path = ""
        if variables is not None:
            device = device_named(archive.header, draft.firmware.variables)
            targets[device.dev_id] = variables
            variables_path = variables.path
        user = self._user if os.geteuid() == 0 else None

        def before_publish(files: Mapping[str, int]) -> None:
            for path, fd in files.items():
                if path == volume:
                    continue  # it goes with its folder
                if path == variables_path:
                    self._cut_variables(path, fd)
                status = os.fstat(fd)
                journal.add(Made(path, status.st_dev, status.st_ino))
                if user is not None:
                    self._give(path, fd, user)

        folder = self._request.folder
        with contextlib.ExitStack() as stack:
            volume = ""
            if draft.tpm is not None and draft.tpm.state and self._tpm_folder is not None:
                device = device_named(archive.header, draft.tpm.state)
                volume = os.path.join(stack.enter_context(OwnFolder("tpm")).path, "state")
                targets[device.dev_id] = TargetSpec(volume, Kind.NEW)
            held = stack.enter_context(HeldFolder(folder)) if folder else None
            folders = stack.enter_context(Folders(held))
            restore(
                archive,
                Plan(targets, None, len(targets) < len(archive.header.devices)),
                self._emit,
                self._cancel,
                self._request.restore._replace(before_publish=before_publish),
                folders,
            )
            if volume:
                self._read_tpm_state(volume)

    def _read_tpm_state(self, volume: str) -> None:
        try:
            self._tpm_state = read_state(volume)
        except Failure as failure:
            self._tpm_trouble = str(failure)

    def _put_tpm_state(self, draft: Draft, identity: Identity) -> None:
        """The domain is defined: its TPM can have its state, before it starts."""
        if not self._tpm_state or self._tpm_folder is None or draft.tpm is None:
            return
        try:
            put_state(self._tpm_folder, identity.uuid, draft.tpm.version, self._tpm_state)
        except Failure as failure:
            self._tpm_state, self._tpm_trouble = b"", str(failure)

    def _cut_variables(self, path: str, fd: int) -> None:
        """Give firmware's variables their size: storages round it up. Raises Failure."""
        size_bytes = os.fstat(fd).st_size
        if size_bytes < self._variables_bytes:
            raise Failure(
                f"the firmware's variables in the archive have {size_bytes} bytes, and this host's "
                f"firmware has {self._variables_bytes}: another build of it is needed (Debian: ovmf)"
            )
        try:
            os.ftruncate(fd, self._variables_bytes)
            os.fsync(fd)
        except OSError as error:
            raise Failure(f"cannot write {path}: {os_error_text(error)}") from error

    def _give(self, path: str, fd: int, user: QemuUser) -> None:
        try:
            os.fchown(fd, user.uid, user.gid)
        except OSError as error:
            self._notice(
                f"{path} cannot be given to libvirt's QEMU (user {user.uid}: "
                f"{os_error_text(error)}): see that it can read it"
            )

    # --- The domain ---

    def _define(self, finished: DomainText) -> Any:
        try:
            return self._host.call(self._host.connection.defineXML, finished.xml)
        except LibvirtFailure as failure:
            raise Failure(f"libvirt does not take the domain: {failure}") from failure

    def _connect_again(self, place: Place | None = None) -> None:
        """Its daemon may have been started again while the disks were restored. Raises Failure.

        `place`: where the domain is to be; None: only something is to be removed.
        """
        if self._host.is_alive:
            return
        lost = self._host
        deadline = time.monotonic() + (_DAEMON_S if place is not None else 0)
        while True:
            try:
                self._host = Host(self._request.uri)
                break
            except LibvirtFailure:
                if time.monotonic() > deadline:
                    raise
                self._cancel.check()
                time.sleep(_RETRY_S)
        lost.close()
        self._removal = Removal(self._host, self._uri, self._notice)
        if place is not None:
            place.reconnect(self._host)

    def _undo(self, journal: MadeJournal) -> None:
        """Remove what was made; what cannot be stays in the journal, for the next restore."""
        try:
            self._connect_again()
            self._removal.remove(journal.read().made)
            journal.remove()
        except Failure as failure:
            self._notice(
                f"not everything is removed ({failure}): the next restore to libvirt does it "
                f"({journal.path})"
            )

    def _drop_checkpoints(self, domain: Any) -> None:
        """Forget an overwritten domain's checkpoints: their bitmaps were on its old disks."""
        lib = self._host.lib
        try:
            for checkpoint in self._host.call(domain.listAllCheckpoints):
                self._host.call(checkpoint.delete, lib.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        except LibvirtFailure as failure:
            self._notice(f"the old disks' checkpoints stay known to libvirt: {failure}")

    def _remove_old(self) -> None:
        try:
            used = paths_in_use(self._host) if self._old else frozenset()
        except LibvirtFailure:
            used = frozenset(old.path for _, old in self._old)
        for place, old in self._old:
            if old.path in used:
                self._stays.append(old.path)
                continue
            try:
                place.remove_old(old)
                self._notice(f"removed {old.path}, which the domain had before")
            except Failure as failure:
                self._notice(f"{old.path} is not needed any more, and stays: {failure}")
        for path in self._stays:
            self._notice(f"{path}, which the domain had before, stays")

    def _start(self, domain: Any, name: str) -> None:
        try:
            self._host.call(domain.create)
        except LibvirtFailure as failure:
            raise Failure(
                f"the domain {name} is restored and defined, and does not start: {failure}"
            ) from failure
        self._notice(f"the domain {name} is started")

    def _tell(
        self,
        archive: Archive,
        draft: Draft,
        identity: Identity,
        chosen: Mapping[str, ChosenPlace],
        finished: DomainText,
    ) -> None:
        omissions = (*draft.omissions, *finished.omissions, *self._lost(archive, draft))
        self._emit(
            {
                "event": "defined",
                "domain": identity.name,
                "uuid": identity.uuid,
                "connection": self._uri,
                "disks": [
                    {
                        "name": key,
                        "device": draft.sources[key],
                        "path": one.placement.path,
                        "format": one.placement.image_format,
                    }
                    for key, one in chosen.items()
                ],
                "left_out": [{"key": one.key, "reason": one.reason} for one in omissions],
            }
        )

    def _lost(self, archive: Archive, draft: Draft) -> list[Omission]:
        lost = []
        if any(device.is_vmstate for device in archive.header.devices):
            lost.append(Omission("vmstate", "the machine's memory is not used: it boots"))
        if draft.tpm is not None and draft.tpm.state and not self._tpm_state:
            why = self._tpm_trouble or "this libvirt keeps TPMs where we cannot write"
            lost.append(Omission("tpm", f"{why}; the machine has a new TPM: have its keys ready"))
        return lost

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": one_line(text)})


def _new_mac() -> str:
    """A network card's address as libvirt makes them: QEMU's prefix, and chance."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
