# SPDX-License-Identifier: Apache-2.0
"""Encryption with age and signatures: what an archive at rest is protected by."""
