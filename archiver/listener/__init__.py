# SPDX-License-Identifier: Apache-2.0
"""The socket that producers and coordinators connect to, and what protects it.

Read in this order: socket.py (the ZeroMQ socket, and who is connected to it),
curve.py (which client keys are accepted), tcp.py (the port, and how many
descriptors each use may have), acceptor.py (the process that accepts TCP
connections), relay.py (how it passes bytes on).

Invariants: a peer that has proved nothing costs a descriptor and some hundred
bytes, in the acceptor's process; nothing is passed on to ZeroMQ before a correct
greeting; each number of connections has a limit, and the log has one, too.
"""
