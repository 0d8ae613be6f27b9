# SPDX-License-Identifier: Apache-2.0
"""The archiver as a service: one port, any number of jobs, a process for each.

Read in this order: main.py (options and start), server.py (the loop and its sockets),
front.py (the core: which job a message belongs to), admission.py (limits), jobs.py (one
job: its life, its instructions), peers.py (producers, and peers without a job), archivers.py (the
processes), storage.py (folders, object stores, the limits of each client).

Invariants: front.py, admission.py, jobs.py and peers.py are pure and answer with lists of
instructions; a client can neither see nor disturb another client's job; no archive is
read, listed, changed or removed for a client.
"""
