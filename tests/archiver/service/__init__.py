# SPDX-License-Identifier: Apache-2.0
"""The archiver as a service: its pure core, and the whole of it with real processes."""
