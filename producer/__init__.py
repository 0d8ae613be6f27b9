# SPDX-License-Identifier: Apache-2.0
"""One process per device: sources, the copy-before-write engine, and sending."""
