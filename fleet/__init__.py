# SPDX-License-Identifier: Apache-2.0
"""Many machines on many hosts: what is due, what may start, what was done."""
