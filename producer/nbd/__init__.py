# SPDX-License-Identifier: Apache-2.0
"""An NBD server: sockets and threads around the codec in protocol.nbd, and what stands behind."""
