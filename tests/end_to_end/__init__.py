# SPDX-License-Identifier: Apache-2.0
"""Whole commands, as a user runs them."""
