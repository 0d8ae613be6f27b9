# SPDX-License-Identifier: Apache-2.0
"""From the events of a job's archiver (archiver/serve.py) to messages for its coordinator. Pure."""

from __future__ import annotations

from vmapipe.protocol import frames, jobs
from vmapipe.runtime.events import Event


def message_of(event: Event, name: str) -> jobs.FromService | None:
    """`name` is the archive's, as the client knows it. None: nothing for a coordinator."""
    match event["event"]:
        case "begun":
            sizes = tuple(device["bytes"] for device in event["devices"])
            return jobs.Begun(bytes.fromhex(event["uuid"]), sizes)
        case "progress":
            done = tuple(device["done_bytes"] for device in event["devices"])
            zero = tuple(device["zero_bytes"] for device in event["devices"])
            return jobs.Progress(event["stored_bytes"], event["plain_bytes"], done, zero)
        case "notice":
            return jobs.Notice(frames.sayable(event["text"]))
        case "stored":
            uuid = bytes.fromhex(event["uuid"])
            return jobs.Stored(name, uuid, event["stored_bytes"], event["plain_bytes"])
    return None
