# SPDX-License-Identifier: Apache-2.0
"""The coordinator of a job, QEMU over QMP, the monitor, and the command line."""
