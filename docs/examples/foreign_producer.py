# SPDX-License-Identifier: Apache-2.0
"""A producer written from docs/wire-protocol.md alone, with pyzmq and msgpack.

usage: foreign_producer.py ENDPOINT JOBHEX NAME PATH

Feeds one raw disk image to an archiver, one cluster a message. Exit code 0: the archive is stored.
"""

import sys
import time

import msgpack
import zmq

endpoint, job, name, path = sys.argv[1:]
heartbeat_s, spoke = 30, 0.0
socket = zmq.Context.instance().socket(zmq.DEALER)
socket.setsockopt(zmq.LINGER, 2000)  # at most so long for our last words, in ms
socket.setsockopt(zmq.SNDTIMEO, 30_000)
socket.connect(endpoint)


def send(*values):
    global spoke
    try:
        socket.send_multipart([msgpack.packb(value) for value in values])
    except zmq.Again:
        sys.exit("the archiver takes nothing")
    spoke = time.monotonic()


def hear():
    """The archiver's next message. Ends the program when it is a refusal, or none comes in time."""
    deadline = time.monotonic() + heartbeat_s
    while (now := time.monotonic()) < deadline:
        if now - spoke >= heartbeat_s / 3:
            send(["PING", {}])
        if socket.poll(heartbeat_s * 1000 // 3 + 1):
            message, fields = msgpack.unpackb(socket.recv())
            if message in ("REFUSE", "ABORT"):
                sys.exit(f"{message}: {fields['reason']}")
            return message, fields
    sys.exit("the archiver is silent")


with open(path, "rb") as disk:
    size = disk.seek(0, 2)
    disk.seek(0)
    send(["HELLO", {"version": 1, "job": bytes.fromhex(job), "device": name, "size": size}])
    message = ""
    while message != "WELCOME":
        message, fields = hear()
    dev_id, limit, heartbeat_s = fields["dev_id"], fields["credit"], fields["heartbeat_s"]
    clusters, charged = -(-size // 65536), 0
    for number in range(clusters):
        wanted = min(65536, size - number * 65536)
        try:
            data = disk.read(wanted)
            if len(data) < wanted:
                raise OSError(0, "the disk has become shorter")
        except OSError as error:
            send(["FAIL", {"reason": f"{path}: {error.strerror}"}])
            sys.exit(f"{path}: {error.strerror}")
        if data.count(0) == len(data):
            data = b""
        charged += 64 + 8 + len(data)
        while limit < charged or socket.poll(0):
            message, fields = hear()
            limit = max(limit, fields.get("limit", 0))
        send(number + 1, [dev_id, number, data])
send(["END", {"frames": clusters, "clusters": clusters}])
while message != "DONE":
    message, fields = hear()
