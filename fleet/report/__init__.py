# SPDX-License-Identifier: Apache-2.0
"""The report of a fleet, or of folders of archives: one page without scripts, JSON, metrics.

Read in this order: facts.py (pure: what is said of each machine), page.py (the page, from
page.html), metrics.py (the same for Prometheus), check.py (for Nagios).
"""
