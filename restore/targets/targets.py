# SPDX-License-Identifier: Apache-2.0
"""All targets of one restore: opened together before anything is written, published together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.restore import TargetSetup
from vmapipe.restore.archive.errors import PlanError, TargetError
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.targets.files import (
    ExistingTarget,
    Folders,
    Identity,
    NewFile,
    identity_of,
    open_configs,
    publish_all,
    write_lines,
)
from vmapipe.restore.targets.image import ExistingImage, NewImage
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec, check_plan
from vmapipe.restore.targets.resume import Journal, ResumableFile
from vmapipe.vma.header import Device

# Where vmstate ends is not known before its end: no file is larger than this.
_NO_END = (1 << 63) - 1


class OpenTargets:
    """A context manager: what was not published when it ends is gone."""

    def __init__(
        self, archive: Archive, plan: Plan, folders: Folders, journal: Journal | None = None
    ) -> None:
        """Opens all of them. Raises RestoreError, PlanError, HeaderError; then none is touched.

        `journal`: new files are kept, and known again, where the restore is interrupted.
        """
        self._folders = folders
        self._journal = journal
        self.archive = archive
        self.plan = plan
        self.devices: list[Device] = []
        self._new: dict[int, NewFile] = {}
        self._images: dict[int, NewImage | ExistingImage] = {}
        self._existing: dict[int, ExistingTarget | ExistingImage] = {}
        self._configs: list[NewFile] = []
        self._inodes: dict[int, tuple[int, int]] = {}
        self._identities = self._taken()
        check_plan(archive.header, plan)
        try:
            for device in archive.header.devices:
                spec = plan.targets.get(device.dev_id)
                if spec is not None:
                    self._open(device, spec)
            if plan.configs_folder is not None:
                self._configs = open_configs(archive.header, plan.configs_folder, folders)
            if journal is not None:
                journal.opened(self._inodes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenTargets:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for file in (*self._new.values(), *self._configs):
            file.close()
        for target in self._existing.values():
            target.close()

    def _open(self, device: Device, spec: TargetSpec) -> None:
        self.devices.append(device)
        if spec.kind is not Kind.NEW:
            self._folders.look_at(spec.path)
            # Before it is opened: its own lock would be in the way of a second time.
            self._take(spec.path)
            target = self._existing[device.dev_id] = self._opened(device, spec)
            if self._identities.get(target.identity) != spec.path:
                raise TargetError(f"{spec.path} was replaced while it was opened")
        elif spec.is_raw:
            file = self._new[device.dev_id] = self._new_file(device, spec)
            if not device.is_vmstate:
                file.set_size(device.size_bytes)
        else:
            image = NewImage(spec.path, self._folders, spec.image_format, device.size_bytes)
            self._new[device.dev_id] = self._images[device.dev_id] = image

    def _new_file(self, device: Device, spec: TargetSpec) -> NewFile:
        if self._journal is None:
            return NewFile(spec.path, self._folders)
        known = self._journal.inode(device.dev_id)
        file = ResumableFile(spec.path, self._folders, self._journal, known)
        self._inodes[device.dev_id] = file.inode
        return file

    def _opened(self, device: Device, spec: TargetSpec) -> ExistingTarget | ExistingImage:
        if spec.is_raw:
            return ExistingTarget(spec, device)
        image = self._images[device.dev_id] = ExistingImage(spec, device)
        return image

    def _taken(self) -> dict[Identity, str]:
        """Return the identities that no target may have: the archive's own."""
        source = self.archive.source
        if isinstance(source, PlainFile):
            status = os.fstat(source.fd)
        elif source.path is not None:
            status = os.stat(source.path)
        else:
            return {}
        whole = "the archive itself"
        return {("file", status.st_dev, status.st_ino): whole, ("block", status.st_rdev, 0): whole}

    def _take(self, path: str) -> None:
        """Two paths may lead to one file. Raises PlanError."""
        try:
            identity = identity_of(os.stat(path))
        except OSError:
            return  # it is told where it is opened
        if identity in self._identities:
            raise PlanError(f"{path} and {self._identities[identity]} are one and the same")
        self._identities[identity] = path

    @property
    def setups(self) -> tuple[TargetSetup, ...]:
        """What workers are told about each target."""
        return tuple(self._setup(device) for device in self.devices)

    def _setup(self, device: Device) -> TargetSetup:
        spec = self.plan.targets[device.dev_id]
        new = self._new.get(device.dev_id)
        target = new if new is not None else self._existing[device.dev_id]
        image = self._images.get(device.dev_id)
        served = image.served if image is not None else None
        return TargetSetup(
            device.dev_id,
            target.fd,
            _NO_END if device.is_vmstate else device.size_bytes,
            spec.write_zeroes if new is None else new.has_old_data,
            device.name.encode("utf-8", "surrogateescape"),
            os.fsencode(target.path),
            os.fsencode(served.nbd) if served is not None else b"",
        )

    @property
    def remover_fds(self) -> list[int]:
        return self._folders.remover_fds

    @property
    def limits(self) -> dict[int, int]:
        """Bytes a second, by dev_id, where there is a limit."""
        specs = self.plan.targets.items()
        return {dev_id: spec.bytes_per_s for dev_id, spec in specs if spec.bytes_per_s}

    def path(self, dev_id: int) -> str | None:
        """Return the path of a device's target; None: it is skipped."""
        spec = self.plan.targets.get(dev_id)
        return None if spec is None else spec.path

    def existing_paths(self) -> list[str]:
        """Return the paths of what held other data before, and stays."""
        specs = [self.plan.targets[dev_id] for dev_id in self._existing]
        return [spec.path for spec in specs if spec.kind is Kind.EXISTING]

    def new_files(self) -> dict[str, int]:
        """Return the descriptors of the new files of devices, by the paths that they will have."""
        return {file.path: file.fd for file in self._new.values()}

    def set_vmstate_sizes(self, clusters_of: Callable[[int], int]) -> None:
        """Give each vmstate file its length, which `clusters_of` (dev_id) knows at the end.

        Raises TargetError.
        """
        for device in self.devices:
            if device.is_vmstate:
                clusters = clusters_of(device.dev_id)
                self._new[device.dev_id].set_size(clusters * CLUSTER_BYTES)

    def add_text(self, path: str, lines: Iterable[str]) -> None:
        """A file of text that is published with the others. Raises TargetError."""
        file = NewFile(path, self._folders)
        self._configs.append(file)
        write_lines(file, lines)

    def publish(self, before: Callable[[Mapping[str, int]], None] | None = None) -> None:
        """Everything is on the disk: give the new files their names, all or none.

        `before`: is called with `new_files` just before that.
        """
        for image in self._images.values():
            if image.served is not None:
                image.served.finish()
        if before is not None:
            before(self.new_files())
        publish_all([*self._new.values(), *self._configs])
