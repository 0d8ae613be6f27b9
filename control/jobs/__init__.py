# SPDX-License-Identifier: Apache-2.0
"""Backups that are running: found, looked at, and steered from outside."""
