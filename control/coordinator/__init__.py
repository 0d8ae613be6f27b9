# SPDX-License-Identifier: Apache-2.0
"""The coordinator: one backup, its processes, and what reports on it or steers it.

Read in this order: job.py (starts the archiver and a producer for each disk, watches
them, ends them), service.py and remote_archiver.py (the archiver's stand-in when a service stores
the archive), steering.py (the speed limit) with latency_control.py (pure), live_base.py and snapshot.py
(an increment's base, and the disks' one instant), observers.py (log, hooks, metrics and status socket around a job), then
each of these: log.py, hooks.py, metrics.py, status.py (pure), status_socket.py.
render.py turns events into text for people; output_spec.py says what ARCHIVE means;
priorities.py and proxmox.py hold the options of those names.

Invariants: a job ends with every child ended and nothing half-made left; an observer
never ends a stored backup; the first child that fails gives the exit code; QEMU is
released before the producers that serve it end.
"""
