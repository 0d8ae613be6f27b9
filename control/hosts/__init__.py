# SPDX-License-Identifier: Apache-2.0
"""Backups and restores on hosts that manage their machines: libvirt, Proxmox VE

Each host has a folder of its own, which knows the host's interface and configurations and nothing of
the others. What a backup or a restore then does is the same as everywhere: the coordinator's job
(control/coordinator/), QEMU's jobs (control/qemu/), open archives (access/). A host's library is
imported by one file of its folder, and only when a command asks for that host.
"""
