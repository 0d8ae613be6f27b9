# SPDX-License-Identifier: Apache-2.0
"""A node of Proxmox VE as its files show it: guests, storages, defaults; which machines run."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping

from vmapipe.control.hosts.pve.defaults import Defaults, parse_defaults
from vmapipe.control.hosts.pve.files import NodeFiles
from vmapipe.control.hosts.pve.guests import Inventory, Kind, PveGuest, parse_pools, parse_tags
from vmapipe.control.hosts.pve.machine import MachineConfig
from vmapipe.control.hosts.pve.storages import PveStorage, PveVolume, parse_storages
from vmapipe.control.qemu.qemu_process import command_line, is_qemu
from vmapipe.control.qmp.addresses import Address, is_listening
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.text import one_line

#: Where the node's files are, if not below /.
ROOT_VARIABLE = "VMAPIPE_PVE_ROOT"
_CONF = re.compile(r"([1-9][0-9]{2,8})\.conf")
# pmxcfs' links lead to nodes/NAME, and nodes/NAME/qemu-server.
_NODE_LINK = re.compile(r"(?:^|/)nodes/([^/]+)")
_FOLDERS: Mapping[str, Kind] = {"qemu-server": "qemu", "lxc": "lxc"}
# LVM scans all its disks; on a busy host that takes seconds.
_LVM_S = 60.0


def root_of(option: str | None) -> str:
    """Return where the node's files are, by --pve-root or the environment."""
    return option or os.environ.get(ROOT_VARIABLE) or "/"


class PveNode:
    """This node; or, below a `root`, one that is simulated, or dead. All but the paths raise Failure."""

    def __init__(self, root: str = "/") -> None:
        """Raises Failure where there is no node of Proxmox VE."""
        self._files = NodeFiles(root)
        self.name = self._own_name()

    @property
    def is_dead(self) -> bool:
        """True for a node that does not run: none of its machines does, and nothing can be locked."""
        return self._files.is_dead

    def path(self, path: str) -> str:
        """Return where a file of the node is for us."""
        return self._files.path(path)

    def _own_name(self) -> str:
        for link in ("/etc/pve/local", "/etc/pve/qemu-server"):
            with contextlib.suppress(OSError):
                if match := _NODE_LINK.search(os.readlink(self.path(link))):
                    return match[1]
        named = self._files.text("/etc/hostname").strip() if self._files.is_elsewhere else ""
        return (named or platform.node()).partition(".")[0]

    # --- Files ---

    def config_path(self, vmid: int) -> str:
        return self.path(f"{self._own_folder('qemu-server')}/{vmid}.conf")

    def config(self, vmid: int) -> MachineConfig:
        """Raises Failure where the machine is not there any more."""
        folder = self._own_folder("qemu-server")
        if f"{vmid}.conf" not in self._files.names(folder):
            raise Failure(
                f"VM {vmid}: this node has no configuration of it ({self.config_path(vmid)})"
            )
        return MachineConfig(self._files.text(f"{folder}/{vmid}.conf"))

    def firewall(self, vmid: int) -> str:
        """Return its firewall's rules; empty: it has none."""
        return self._files.text(f"/etc/pve/firewall/{vmid}.fw")

    def _own_folder(self, kind: str) -> str:
        """Return the folder of this node's guests: pmxcfs has a link to it at /etc/pve."""
        if self.name in self._files.names("/etc/pve/nodes"):
            return f"/etc/pve/nodes/{self.name}/{kind}"
        return f"/etc/pve/{kind}"

    def inventory(self) -> Inventory:
        """Return all guests of the cluster, and the pools."""
        guests = dict[int, PveGuest]()
        for kind in _FOLDERS:
            for node in self._files.names("/etc/pve/nodes"):
                if node != self.name:
                    guests |= self._guests_in(f"/etc/pve/nodes/{node}/{kind}", kind, node)
        # Last: in a number that two have, ours is the one that can be backed up.
        for kind in _FOLDERS:
            guests |= self._guests_in(self._own_folder(kind), kind, self.name)
        return Inventory(self.name, guests, parse_pools(self._files.text("/etc/pve/user.cfg")))

    def _guests_in(self, folder: str, kind: str, node: str) -> dict[int, PveGuest]:
        found = {}
        for match in filter(None, map(_CONF.fullmatch, self._files.names(folder))):
            vmid = int(match[1])
            with contextlib.suppress(Failure):  # it says so itself when it is to be backed up
                config = MachineConfig(self._files.text(f"{folder}/{match[0]}"))
                tags = parse_tags(config.tags)
                found[vmid] = PveGuest(vmid, _FOLDERS[kind], node, config.is_template, tags)
            found.setdefault(vmid, PveGuest(vmid, _FOLDERS[kind], node))
        return found

    def storages(self) -> dict[str, PveStorage]:
        return parse_storages(self._files.text("/etc/pve/storage.cfg"))

    def defaults(self) -> Defaults:
        return parse_defaults(self._files.text("/etc/vzdump.conf"))

    def cluster(self) -> str:
        """Return the cluster's name; empty: the node is alone."""
        match = re.search(
            r"^\s*cluster_name:\s*(\S+)", self._files.text("/etc/pve/corosync.conf"), re.M
        )
        return match[1] if match else ""

    # --- Running machines ---

    def _run_folder(self, kind: str) -> str:
        """Return /var/run or /var/lock, which are links to folders of the host that runs."""
        path = self.path(f"/var/{kind}")
        if self._files.is_elsewhere and os.path.islink(path):
            path = self.path({"run": "/run", "lock": "/run/lock"}[kind])
        return f"{path}/qemu-server"

    def socket(self, vmid: int, kind: str) -> str:
        """Return the path of a machine's socket: `qmp`, its only monitor, or `qga`, its agent's."""
        return f"{self._run_folder('run')}/{vmid}.{kind}"

    def lock_path(self, vmid: int) -> str:
        """Return the file that Proxmox VE locks (flock) to change a configuration."""
        return f"{self._run_folder('lock')}/lock-{vmid}.conf"

    def note_path(self, vmid: int, what: str = "lock") -> str:
        """Return the file in which we note that a lock is ours; or a machine that a `standstill` of ours holds."""
        return self.path(f"/var/lib/vmapipe/pve/{vmid}.{what}")

    def is_running(self, vmid: int) -> bool:
        """Tell whether the machine's QEMU runs. Raises Failure for one that has no monitor."""
        if self.is_dead:
            return False
        pid_path = f"{self._run_folder('run')}/{vmid}.pid"
        listens = is_listening(Address(self.socket(vmid, "qmp")))
        try:
            with open(pid_path, encoding="ascii") as file:
                pid = int(file.read(32))
        except (OSError, ValueError):
            return listens
        words = command_line(pid) if is_qemu(pid) else []
        named = (
            words[i + 1 : i + 2] == [str(vmid)] for i, word in enumerate(words) if word == "-id"
        )
        is_it = any(named) or any(word.endswith(f"/{vmid}.pid") for word in words)
        if is_it and not listens:
            raise Failure(
                f"VM {vmid} runs (process {pid}), and nothing listens at its monitor "
                f"{self.socket(vmid, 'qmp')}: its disks are in use and cannot be read"
            )
        return listens

    # --- Volumes ---

    @contextlib.contextmanager
    def volume_path(self, volume: PveVolume) -> Iterator[str]:
        """The path of a volume as we see it, for the block; a logical volume is active meanwhile.

        Raises Failure.
        """
        path = self._place_of(volume)
        if path:
            yield path
            return
        if not volume.lv:
            raise Failure(
                f"{self.path(volume.path)}: the volume is not there (is its storage mounted, mapped?)"
            )
        # Proxmox VE has a volume active only where a machine uses it; -K: thin snapshots, too.
        _lvchange("-ay", "-K", volume.lv)
        try:
            path = self._place_of(volume)
            if not path:
                raise Failure(f"{volume.path}: the volume is active, and its device is not there")
            yield path
        finally:
            # One that is left active harms nothing: Proxmox VE activates it itself.
            with contextlib.suppress(Failure):
                _lvchange("-an", volume.lv)

    def _place_of(self, volume: PveVolume) -> str:
        """Return the path of a volume as we see it; empty: it is not there."""
        places = [self.path(volume.path)]
        if self._files.is_elsewhere and volume.path.startswith("/dev/"):
            places.append(volume.path)  # the devices of a dead host's disks are those of this one
        return next((place for place in places if os.path.exists(place)), "")

    def check_target(self, folder: str, mount_point: str) -> None:
        """Raises UsageError for a folder that is not there, or not the storage's own."""
        if mount_point and not os.path.ismount(mount_point):
            raise UsageError(
                f"{mount_point} is not mounted: the archives would fill the host's own disk; mount it, "
                "or see `pvesm status`"
            )
        if not os.path.isdir(folder):
            raise UsageError(f"{folder}: there is no such folder for the archives")


def _lvchange(*words: str) -> None:
    """Raises Failure."""
    try:
        done = subprocess.run(
            ["lvchange", *words],
            capture_output=True,
            timeout=_LVM_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise Failure(f"volume {words[-1]} is not active, and there is no lvchange here") from error
    except subprocess.TimeoutExpired as error:
        raise Failure(f"lvchange {' '.join(words)} has not ended within {_LVM_S:.0f} s") from error
    if done.returncode:
        said = one_line(done.stderr.decode(errors="replace").strip(), 300)
        raise Failure(f"lvchange {' '.join(words)} failed: {said}")
