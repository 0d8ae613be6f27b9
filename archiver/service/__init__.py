# SPDX-License-Identifier: Apache-2.0
"""An archiver that runs as a service: one port, any number of jobs, a process for each."""
