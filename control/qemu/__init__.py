# SPDX-License-Identifier: Apache-2.0
"""Running QEMUs: what to ask of them over QMP, and how to leave them clean."""
