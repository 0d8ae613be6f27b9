# SPDX-License-Identifier: Apache-2.0
"""The worker processes: what they are given, and how they write it."""
