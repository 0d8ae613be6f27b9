# SPDX-License-Identifier: Apache-2.0
"""libvirt: its domains are backed up as they run, and archives become domains again

`connect.py` is the one file that imports libvirt's library.
"""
