# SPDX-License-Identifier: Apache-2.0
"""`vmapipe monitor`: serves disks to guests, and tells backups where to find them."""
