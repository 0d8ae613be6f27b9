# SPDX-License-Identifier: Apache-2.0
"""Code that all processes of vmapipe share, and no more than that: this room imports no other.

Read in this order: `errors` (exit codes), `events` (what a child reports, what a parent commands),
`process` (how one starts, fails and ends), `cancel` (signals, a lost parent), `children` (the
parent's side). Then by need: `arguments`, `text`, `rate_limit`, `threads`, `syscalls`; files:
`folders`, `side_files`, `disk_use`, `image_format`, `storage_daemon`; secrets and stores: `keys`,
`objectstore`.

Invariants: a user's mistake is one line and an exit code; every wait has an end and hears a
Cancel; a path that another user can change is never followed blindly; all text from outside is
escaped and bounded before it is shown.
"""
