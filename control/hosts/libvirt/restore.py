# SPDX-License-Identifier: Apache-2.0
"""A restore to libvirt: places for the disks, their content, and at the end the domain.

The domain is defined last, in one step of libvirt's: until then nothing that was there before has
changed, and all that was made is removed where anything fails.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from vmapipe.access.machine.domain import (
    NAME_RULE,
    DomainText,
    Draft,
    HostFacts,
    Identity,
    Network,
    domain_xml,
    is_domain_name,
)
from vmapipe.access.machine.firmware import Firmware, find_firmware
from vmapipe.access.machine.spec import Omission
from vmapipe.control.hosts.libvirt.abilities import check_domain, facts_of, user_at
from vmapipe.control.hosts.libvirt.connect import (
    DAEMON_S,
    Host,
    LibvirtFailure,
    is_remote,
    reconnected,
    shown_uri,
)
from vmapipe.control.hosts.libvirt.host_facts import QemuUser
from vmapipe.control.hosts.libvirt.identity import identity_of, network_of
from vmapipe.control.hosts.libvirt.live import (
    SUFFIX,
    LiveDomain,
    LiveWords,
    NewLiveFolder,
    live_folder_of,
)
from vmapipe.control.hosts.libvirt.overwriting import (
    OldDisks,
    domain_to_overwrite,
    drop_checkpoints,
    find_domain,
    take_back,
)
from vmapipe.control.hosts.libvirt.places import (
    ChosenPlace,
    FolderPlace,
    Place,
    PoolPlace,
    Wanted,
)
from vmapipe.control.hosts.libvirt.removal import Removal, description_of
from vmapipe.control.hosts.libvirt.tpm_state import put_state, read_state, tpm_folder
from vmapipe.control.hosts.libvirt.undo import Made, MadeJournal
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.job import Options, restore
from vmapipe.restore.targets.files import Folders
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec, device_named
from vmapipe.restore.targets.targets import OpenTargets
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.folders import HeldFolder, OwnFolder
from vmapipe.runtime.text import name_text, one_line

_USUAL_POOL = "default"


class DefineRequest(NamedTuple):
    """What a user asks for.

    `live`: None: not live. `archive`: as it was named; `uri`, `name`, `pool`, `folder`, `image_format`: empty: the usual
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
    live: LiveWords | None = None


class _Wish(NamedTuple):
    """What the domain is to be. `existing`: the one that it overwrites, `before`: its XML."""

    identity: Identity
    existing: Any
    before: str
    facts: HostFacts
    network: Network | None
    firmware: Firmware | None


class _MadeDisks(NamedTuple):
    """What a domain is defined on. `first`: its text for now; `finished`: when all disks are there."""

    chosen: dict[str, ChosenPlace]
    finished: DomainText
    first: DomainText
    live: NewLiveFolder | None


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
        self._old = OldDisks(self._notice)
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
        if not is_domain_name(name):
            raise UsageError(f"the machine is called {name_text(name)}: say --name ({NAME_RULE})")
        if self._goes_on(archive, name):
            return
        wish = self._wish(name, draft)
        place = self._place()
        identity = wish.identity
        with contextlib.ExitStack() as stack:
            journal = stack.enter_context(
                MadeJournal.new(self._uri, name, identity.uuid, self._request.archive)
            )
            made, domain, session = None, None, None
            try:
                made = self._make(archive, draft, wish, place, journal)
                domain = self._define(made.first)
                self._put_tpm_state(draft, identity)
                if made.live is not None:
                    session = stack.enter_context(self._session(made.live.path))
                    session.start()
            except BaseException:
                if made is not None and domain is not None:
                    take_back(self._host, domain, wish.before, self._notice)
                self._undo(journal)
                raise
            journal.remove()
            self._tell(archive, draft, identity, made.chosen, made.finished)
            if wish.existing is not None:
                drop_checkpoints(self._host, domain, self._notice)
            if session is not None:
                self._old.tell_staying()
                session.run(archive)
                return
        self._old.remove(self._host)
        if self._request.start:
            self._start(domain, name)

    def _wish(self, name: str, draft: Draft) -> _Wish:
        """Raises Failure."""
        request = self._request
        existing = domain_to_overwrite(self._host, name, overwrite=request.overwrite)
        identity = identity_of(self._host, name, draft, existing, is_same=request.is_same)
        facts = facts_of(self._host, self._capabilities, draft, self._cancel)
        network = network_of(request.network, facts, is_same=request.is_same)
        firmware = None
        if draft.firmware.kind == "uefi":
            firmware = find_firmware(draft.firmware, is_q35=draft.is_q35)
        before = ""
        if existing is not None:
            before = description_of(self._host, existing, secure=True)
        return _Wish(identity, existing, before, facts, network, firmware)

    def _make(
        self, archive: Archive, draft: Draft, wish: _Wish, place: Place, journal: MadeJournal
    ) -> _MadeDisks:
        """Make all that the domain needs, so that it can be defined. Raises Failure."""
        identity, name = wish.identity, wish.identity.name
        chosen, variables = self._make_room(archive, draft, name, place, journal, wish.firmware)
        self._old.check(self._host, name, wish.existing, place, chosen)
        places = {key: one.placement for key, one in chosen.items()}
        path = variables.path if variables is not None else ""
        about = (wish.facts, wish.network, wish.firmware, path)
        finished = first = domain_xml(draft, identity, places, *about)
        live = None
        if self._request.live is not None:
            path = f"{place.live_folder()}/{name}{SUFFIX}"
            live = NewLiveFolder(path, journal, self._given_user)
            live.add_all(archive, draft.disks, chosen, self._notice)
            first = domain_xml(draft, identity, {**places, **live.placements}, *about)
        # What libvirt does not take is better known now than when all is restored.
        check_domain(self._host, finished.xml)
        self._restore(archive, draft, chosen, variables, journal, live)
        self._connect_again(place)
        place.settle()
        self._cancel.check()
        # A restore takes hours: somebody may have made it, or started it, meanwhile.
        domain_to_overwrite(self._host, name, overwrite=self._request.overwrite)
        if live is not None:
            old = self._old.made()
            live.write(self._request.archive, archive, identity.uuid, finished.xml, old)
        if self._tpm_state:
            journal.plan(f"the state of {name}'s TPM")
        return _MadeDisks(chosen, finished, first, live)

    @property
    def _given_user(self) -> QemuUser | None:
        """Who gets what we make; None: it is ours, or cannot be given."""
        return self._user if os.geteuid() == 0 else None

    # --- Live ---

    def _session(self, folder: str) -> LiveDomain:
        if self._request.live is None:
            raise UsageError(
                f"the domain is being restored live, and {folder} has what it wrote meanwhile: say "
                "--live, and it goes on"
            )
        live, user = self._request.live, self._given_user
        return LiveDomain(self._uri, folder, live, user, self._emit, self._cancel)

    def _goes_on(self, archive: Archive, name: str) -> bool:
        """Go on with a live restore of a domain; whether there was one to go on with."""
        domain = find_domain(self._host, name)
        if domain is None:
            return False
        call = self._host.call
        texts = [description_of(self._host, domain), str(call(domain.XMLDesc, 0))]
        folder = live_folder_of(name, str(call(domain.UUIDString)), texts)
        if not folder:
            return False
        with self._session(folder) as session:
            session.go_on(archive)
            session.run(archive)
        return True

    # --- Before anything is made ---

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
            self._old.add(place, chosen[disk.key].old)
        if firmware is None or not draft.firmware.variables:
            return chosen, None
        files = FolderPlace(place.folder(), None)
        path, old = files.free(f"{name}_VARS.fd", overwrite=request.overwrite)
        self._old.add(files, old)
        self._variables_bytes = firmware.variables_bytes
        return chosen, TargetSpec(path, Kind.NEW)

    def _restore(
        self,
        archive: Archive,
        draft: Draft,
        chosen: Mapping[str, ChosenPlace],
        variables: TargetSpec | None,
        journal: MadeJournal,
        live: NewLiveFolder | None,
    ) -> None:
        """Restore the disks; those that arrive later are made."""
        targets: dict[int, TargetSpec] = {}
        for key, source in draft.sources.items():
            targets[device_named(archive.header, source).dev_id] = chosen[key].target
        later: dict[int, TargetSpec] = {}
        for disk in live.disks if live is not None else ():
            spec = targets.pop(disk.dev_id)
            if spec.kind is Kind.NEW:
                later[disk.dev_id] = spec
        variables_path = ""
        if variables is not None:
            device = device_named(archive.header, draft.firmware.variables)
            targets[device.dev_id] = variables
            variables_path = variables.path
        user = self._given_user

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
            with OpenTargets(archive, Plan(later, is_chosen=True), folders) as made:
                made.publish(before_publish)
            if targets:
                restore(
                    archive,
                    Plan(targets, None, len(targets) < len(archive.header.devices)),
                    self._emit if live is None else self._only_notices,
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
        limit_s = DAEMON_S if place is not None else 0
        self._host = reconnected(self._request.uri, limit_s, self._cancel)
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

    def _only_notices(self, event: Event) -> None:
        """Of what is restored before the machine starts the rest is not worth telling."""
        if event["event"] == "notice":
            self._emit(event)

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": one_line(text)})
