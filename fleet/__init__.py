# SPDX-License-Identifier: Apache-2.0
"""Many machines on many hosts: what is due, what may start, what was done.

Read in this order: inventory.py and windows.py (pure: what is promised, and when), values.py,
configuration.py and ansible.py (the files that say it), catalogue.py and sqlite_file.py (what was
done), planner.py (pure: what may
start, and why the others may not), jobs.py (pure: a job as it travels), scan.py
(which machines there are), agent.py and carrier.py (a job on its host, and the way there), outcome.py and rounds.py (one
round by subprocesses and ssh), engine.py, postgres.py, serve.py and worker.py (the same with a queue), rescan.py (the
catalogue made again from archives), report/ (the promise against what
was done: a page, a plugin's lines).

Invariants: nothing is remembered but what was done, so that a lost queue or catalogue costs nothing and what is missing is
due again; no machine is backed up twice at once; no limit is exceeded; a host runs named verbs with checked
arguments, and never code; no restore needs any of it.
"""
