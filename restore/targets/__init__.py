# SPDX-License-Identifier: Apache-2.0
"""Where disks and configs go: new files, existing files, block devices."""
