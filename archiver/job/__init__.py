# SPDX-License-Identifier: Apache-2.0
"""One archive in the making, from the first producer to the archive's name.

Read in this order: spec.py (what a job is told, its events and instructions),
job.py (the core: an event in, a list of instructions out), producers.py (who
belongs to the job, after a lost connection too), device.py (the clusters and the
credit of one device), server.py (the loop: socket, core, writer), writer.py (the
queue and the thread that writes). Where there is a base: synthesis.py (which clusters
make which extents), fill.py (the same, carried out).

Invariants: job.py, producers.py, device.py and synthesis.py are pure, without clock or I/O; no
cluster is stored twice, and none is missing at the end; what is unwritten is at
most the window of each device; the first end of a job counts.
"""
