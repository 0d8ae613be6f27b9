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
from vmapipe.control.hosts.pve.guests import Inventory, Kind, PveGuest, parse_pools, parse_tags
from vmapipe.control.hosts.pve.machine import MachineConfig
from vmapipe.control.hosts.pve.storages import PveStorage, PveVolume, parse_storages
from vmapipe.control.qemu.qemu_process import command_line, is_qemu
from vmapipe.control.qmp.addresses import Address, is_listening
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.side_files import open_regular
from vmapipe.runtime.text import one_line

#: Where the node's files are, if not below /.
ROOT_VARIABLE = "VMAPIPE_PVE_ROOT"
# pmxcfs itself takes no larger file (1 MiB).
_MAX_BYTES = 1 << 20
_CONF = re.compile(r"([1-9][0-9]{2,8})\.conf")
_FOLDERS: Mapping[str, Kind] = {"qemu-server": "qemu", "lxc": "lxc"}
# LVM scans all its disks; on a busy host that takes seconds.
_LVM_S = 60.0


class PveNode:
    """This node, with its files below `root`."""

    def __init__(self, root: str = "/") -> None:
        """Raises Failure where there is no node of Proxmox VE."""
        self.root = os.path.abspath(root or "/").rstrip("/")
        if not os.path.isdir(self.path("/etc/pve")):
            raise Failure(
                f"{self.path('/etc/pve')}: no Proxmox VE is here (or its service pve-cluster does not "
                "run): --pve is for its nodes; for other machines see --qmp and --disk"
            )
        self.name = self._own_name()

    def path(self, path: str) -> str:
        """Return where a file of the node is for us."""
        return self.root + path

    def _own_name(self) -> str:
        with contextlib.suppress(OSError):
            return os.path.basename(os.readlink(self.path("/etc/pve/local")).rstrip("/"))
        if self.root:
            with contextlib.suppress(Failure):
                return self._text("/etc/hostname").strip().partition(".")[0]
        return platform.node().partition(".")[0]

    # --- Files ---

    def _text(self, path: str) -> str:
        """Return a file's text; empty: it is not there. Raises Failure."""
        try:
            fd = open_regular(self.path(path))
            with open(fd, "rb") as file:
                return file.read(_MAX_BYTES).decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise Failure(f"cannot read {self.path(path)}: {os_error_text(error)}") from error

    def config_path(self, vmid: int) -> str:
        return self.path(f"{self._own_folder('qemu-server')}/{vmid}.conf")

    def config(self, vmid: int) -> MachineConfig:
        """Raises Failure where the machine is not there any more."""
        path = f"{self._own_folder('qemu-server')}/{vmid}.conf"
        if not os.path.exists(self.path(path)):
            raise Failure(f"VM {vmid}: its configuration {self.path(path)} is gone")
        return MachineConfig(self._text(path))

    def firewall_path(self, vmid: int) -> str:
        """Return the path of its firewall's rules; empty: it has none."""
        path = self.path(f"/etc/pve/firewall/{vmid}.fw")
        return path if os.path.isfile(path) else ""

    def _own_folder(self, kind: str) -> str:
        """Return the folder of this node's guests: pmxcfs has a link to it at /etc/pve."""
        own = f"/etc/pve/nodes/{self.name}/{kind}"
        return own if os.path.isdir(self.path(own)) else f"/etc/pve/{kind}"

    def inventory(self) -> Inventory:
        """Return all guests of the cluster, and the pools. Raises Failure."""
        guests = dict[int, PveGuest]()
        for kind in _FOLDERS:
            for node in self._other_nodes():
                guests |= self._guests_in(f"/etc/pve/nodes/{node}/{kind}", kind, node)
        # Last: in a number that two have, ours is the one that can be backed up.
        for kind in _FOLDERS:
            guests |= self._guests_in(self._own_folder(kind), kind, self.name)
        return Inventory(self.name, guests, parse_pools(self._text("/etc/pve/user.cfg")))

    def _other_nodes(self) -> Iterator[str]:
        with contextlib.suppress(OSError):
            yield from sorted(set(os.listdir(self.path("/etc/pve/nodes"))) - {self.name})

    def _guests_in(self, folder: str, kind: str, node: str) -> dict[int, PveGuest]:
        try:
            names = os.listdir(self.path(folder))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Failure(
                f"cannot look into {self.path(folder)}: {os_error_text(error)}"
            ) from error
        found = {}
        for match in filter(None, map(_CONF.fullmatch, names)):
            vmid = int(match[1])
            with contextlib.suppress(Failure):  # it says so itself when it is to be backed up
                config = MachineConfig(self._text(f"{folder}/{match[0]}"))
                tags = parse_tags(config.tags)
                found[vmid] = PveGuest(vmid, _FOLDERS[kind], node, config.is_template, tags)
            found.setdefault(vmid, PveGuest(vmid, _FOLDERS[kind], node))
        return found

    def storages(self) -> dict[str, PveStorage]:
        return parse_storages(self._text("/etc/pve/storage.cfg"))

    def defaults(self) -> Defaults:
        return parse_defaults(self._text("/etc/vzdump.conf"))

    def cluster(self) -> str:
        """Return the cluster's name; empty: the node is alone."""
        match = re.search(r"^\s*cluster_name:\s*(\S+)", self._text("/etc/pve/corosync.conf"), re.M)
        return match[1] if match else ""

    # --- Running machines ---

    def _run_folder(self, kind: str) -> str:
        """Return /var/run or /var/lock, which are links to folders of the host that runs."""
        path = self.path(f"/var/{kind}")
        if self.root and os.path.islink(path):
            path = self.path({"run": "/run", "lock": "/run/lock"}[kind])
        return f"{path}/qemu-server"

    def socket(self, vmid: int, kind: str) -> str:
        """Return the path of a machine's socket: `qmp`, its only monitor, or `qga`, its agent's."""
        return f"{self._run_folder('run')}/{vmid}.{kind}"

    def lock_path(self, vmid: int) -> str:
        """Return the file that Proxmox VE locks (flock) to change a configuration."""
        return f"{self._run_folder('lock')}/lock-{vmid}.conf"

    def note_path(self, vmid: int) -> str:
        """Return the file in which we note that a lock is ours."""
        return self.path(f"/var/lib/vmapipe/pve/{vmid}.lock")

    def is_running(self, vmid: int) -> bool:
        """Tell whether the machine's QEMU runs. Raises Failure for one that has no monitor."""
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
        path = self.path(volume.path)
        if self.root and volume.path.startswith("/dev/") and not os.path.exists(path):
            path = volume.path  # the devices of a dead host's disks are those of this one
        if os.path.exists(path) or not volume.lv:
            if not os.path.exists(path):
                raise Failure(f"{path}: the volume is not there (is its storage mounted, mapped?)")
            yield path
            return
        # Proxmox VE has a volume active only where a machine uses it; -K: thin snapshots, too.
        _lvchange("-ay", "-K", volume.lv)
        try:
            if not os.path.exists(path):
                raise Failure(f"{path}: the volume is active, and its device is not there")
            yield path
        finally:
            # One that is left active harms nothing: Proxmox VE activates it itself.
            with contextlib.suppress(Failure):
                _lvchange("-an", volume.lv)

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
