# SPDX-License-Identifier: Apache-2.0
"""A machine's memory, as QEMU's migration stream: read to its end, whatever happens."""
