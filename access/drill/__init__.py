# SPDX-License-Identifier: Apache-2.0
"""The restore test: `vmapipe drill` boots an archive and says whether it did.

Read in this order: plan.py (pure: what has to answer), signs.py (pure: texts that mean failure, or a
login), screen.py (pure: pictures, and the text on them), judge.py (pure: the verdict), run.py (one test: the
machine, its disks, its end), watch.py (a machine that is watched, and what its console has said), probes.py
(who asks the guest), result.py (what is kept).

Invariants: the archive is never written to; the guest reaches nothing but this process; every wait
has an end; what was left out of the configuration is named in the result; "booted" needs an answer.
"""
