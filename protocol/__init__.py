# SPDX-License-Identifier: Apache-2.0
"""What travels between processes. Pure: no socket, file, thread or clock."""
