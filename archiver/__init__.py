# SPDX-License-Identifier: Apache-2.0
"""One process for each archive, and a service that starts such processes.

Read in this order: main.py (the command line of both), arguments.py (its
options), job/ (one archive), outputs/ (where its bytes go), listener/ (the
socket that producers come to), service/ (many jobs behind one port).

Invariants: an archive has its name only when it is complete and on disk; a job
that fails leaves nothing behind; memory is bounded by the credit that the
producers were granted, whatever they send. main.py and service/ import job/,
listener/ and outputs/, and none of these imports them.
"""
