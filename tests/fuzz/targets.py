# SPDX-License-Identifier: Apache-2.0
"""What a fuzzer feeds with bytes: the decoder of frames, a job with hostile peers, QEMU, an agent,
both sides of NBD, archives and manifests, and what `vmapipe files` and its parser tell each other.

Each target takes any bytes and returns, or raises what is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.archiver.job.world import JOB, spec
from tests.fuzz import archive_targets, nbd_targets, talking
from tests.fuzz.choices import Bytes
from tests.network.lossy import Producer, World
from tests.protocol.messages import EXAMPLES, encode
from vmapipe.access.files import messages as files_messages
from vmapipe.archiver.job.job import Job, JobPhase
from vmapipe.archiver.job.spec import TimePassed
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol import transfer
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.transfer import (
    Bye,
    ClusterFrame,
    End,
    Fail,
    Hello,
    Message,
    Ping,
    Resume,
    RunFrame,
    Scattered,
    SharedCluster,
    SharedRun,
)

CODES = {
    *("malformed", "too-large", "version", "sequence", "wrong-device", "credit", "counts"),
    *("coverage", "unknown-job", "unknown-session", "restarted", "unknown-device"),
    *("duplicate-device", "bad-size", "busy"),
}
_HONEST = bytes(5 * CLUSTER_BYTES // 2) + b"\xa5" * (CLUSTER_BYTES // 2)
_SESSIONS = (b"", b"s" * 16, b"t" * 16)
# Enough for every state; more makes a run slow and finds nothing new.
_MAX_STEPS = 64


def decoder(data: bytes) -> None:
    """Whatever comes is a message or is refused with a code of the page; and what is read can be said."""
    source = Bytes(data)
    parts = [source.take(source.number(2)) for _ in range(source.number() % 5)]
    try:
        message = transfer.decode(parts)
    except RemoteProtocolError as error:
        if error.code not in CODES:
            raise AssertionError(f"the code {error.code!r} is not on the page") from error
        return
    again = transfer.decode(encode(message))
    if again != message:
        raise AssertionError(f"{message!r:.200} is read back as {again!r:.200}")


def written(message: Message) -> bytes:
    """A message as `decoder` takes it apart again."""
    parts = [bytes(part) for part in encode(message)]
    return bytes([len(parts)]) + b"".join(len(p).to_bytes(2, "little") + p for p in parts)


def session(data: bytes) -> None:
    """A job of two devices: one honest producer, and peers that say what the bytes tell them."""
    source = Bytes(data)
    world = World(Job(spec("a", "b", start_timeout_s=60, heartbeat_s=10, reconnect_s=20), 0.0))
    honest = Producer("a", _HONEST, b"h" * 16)
    world.producers.append(honest)
    world.connect(honest)
    now = 0.0
    for _ in range(_MAX_STEPS):
        if not source.more or world.job.over:
            break
        now = _step(source, world, honest, now)
        _check(world, honest)


def _step(source: Bytes, world: World, honest: Producer, now: float) -> float:
    match source.number() % 16:
        case 0:
            honest.step()
        case 1 if honest.to_archiver:
            world.deliver(honest.connection, honest.to_archiver.popleft(), now)
        case 2 if honest.from_archiver:
            honest.hear()
        case 3:
            world.connect(honest)
        case 4 if world.queue:
            world.write()
        case 5:
            now += source.number() / 8
            world.carry_out(world.job.handle(TimePassed(now)))
        case 6:
            world.store_if_ready()
        case 7:
            parts = [source.take(source.number(2)) for _ in range(source.number() % 5)]
            world.deliver(_peer(source), parts, now)
        case 15:
            world.deliver(_peer(source), [bytes(part) for part in encode(_scattered(source))], now)
        case _:
            message = _message(source)
            world.deliver(_peer(source), [bytes(part) for part in encode(message)], now)
    return now


def _peer(source: Bytes) -> bytes:
    return b"p%d" % (source.number() % 4)


def _message(source: Bytes) -> Message:
    """Well formed, and sensible or not."""
    first, count, seq = source.number(), 1 + source.number() % 40, 1 + source.number() % 8
    dev_id, session = 1 + source.number() % 3, _SESSIONS[source.number() % 3]
    masks = source.take(2) * count if source.number() & 1 else b""
    makers: list[Callable[[], Message]] = [
        lambda: Hello(1, JOB, "ba"[first % 2], count << 14, session=session, attempt=seq),
        lambda: Resume(1, JOB, session or b"h" * 16, first),
        lambda: RunFrame(seq, dev_id, first % 8, count, masks, _payload(masks)),
        lambda: RunFrame(seq, dev_id, first % 8, count, b"", memoryview(b"")),
        lambda: ClusterFrame(seq, dev_id, first % 8, bytes(first) * count),
        lambda: SharedRun(seq, dev_id, first, count, masks or b"\0\1" * count, first << 12, 0),
        lambda: End(seq, count),
        lambda: Ping() if first & 1 else Bye() if first & 2 else Fail("x" * first),
    ]
    message = makers[source.number() % len(makers)]()
    if isinstance(message, RunFrame | SharedRun) and transfer.masked_bytes(message.masks) > 1 << 22:
        return Ping()
    return message


def _scattered(source: Bytes) -> Scattered:
    seq, dev_id = 1 + source.number() % 8, 1 + source.number() % 3
    clusters = [
        SharedCluster(source.number() % 8, source.number() << 12, source.number(2))
        for _ in range(1 + source.number() % 8)
    ]
    return Scattered(seq, dev_id, tuple(clusters))


def _payload(masks: bytes) -> memoryview:
    return memoryview(b"\x5a" * transfer.masked_bytes(masks))


def _check(world: World, honest: Producer) -> None:
    job = world.job
    peers = job._peers
    if len(peers) > 2 or len(peers._ignored) > 1024:
        raise AssertionError("peers without number are remembered")
    for device in job.devices:
        if device.clusters > max(1, device.device.clusters):
            raise AssertionError(f"{device.device.name!r} has more clusters than it is large")
    held = sum(len(part) for extent in world.queue for part in extent.buffers)
    if held > (32 << 20):
        raise AssertionError(f"{held} bytes wait to be written")
    # Somebody may have come as `a` first: then the honest one was refused.
    is_honest = any(peer.side.session == b"h" * 16 for peer in peers.all)
    if job.phase is JobPhase.DONE and is_honest and world.images()["a"] != _HONEST:
        raise AssertionError("the archive does not hold what the honest producer sent")
    if job.phase is JobPhase.FAILED and not job.reason:
        raise AssertionError("the job failed without a reason")


def files(data: bytes) -> None:
    """What comes from a parser that was taken over, or goes to it: a message or an error."""
    source = Bytes(data)
    decode = (files_messages.decode_for_asker, files_messages.decode_for_parser)[
        source.number() & 1
    ]
    packet = source.take(len(data))
    try:
        message = decode([packet])
    except RemoteProtocolError:
        return
    again = decode([files_messages.encode(message)])
    if again != message:
        raise AssertionError(f"{message!r:.200} is read back as {again!r:.200}")


def _files_seeds() -> list[bytes]:
    said: list[files_messages.FromAsker | files_messages.FromParser] = [
        files_messages.Ask("list", 0, b"1", b"/etc", 0, 0),
        files_messages.Bytes(b"data"),
        files_messages.DiskUnreadable(b"why"),
        files_messages.Read(0, 512, 4096),
        files_messages.FileData(512, b"data"),
        files_messages.ParserNotice(b"a word"),
        files_messages.AnswerEnd(),
    ]
    return [
        bytes([isinstance(each, files_messages.FromAsker)]) + bytes(files_messages.encode(each))
        for each in said
    ]


def seeds(name: str) -> list[bytes]:
    """Return where a fuzzer begins, beside what it has found before."""
    if name in ("qmp", "agent"):
        return talking.seeds(name)
    if name in archive_targets.TARGETS:
        return list(archive_targets.seeds())
    if name == "files":
        return _files_seeds()
    if name == "decoder":
        # Not the cluster: 64 KiB that tell nothing new.
        return [written(each) for kind, each in EXAMPLES.items() if kind != "CLUSTER"]
    return []


TARGETS: dict[str, Callable[[bytes], None]] = {
    "decoder": decoder,
    "session": session,
    "qmp": talking.qmp,
    "agent": talking.agent,
    "files": files,
    **nbd_targets.TARGETS,
    **archive_targets.TARGETS,
}
LONGEST_BYTES = {
    "decoder": 6000,
    "session": 600,
    "qmp": 3000,
    "agent": 1000,
    "files": 600,
    **nbd_targets.LONGEST_BYTES,
    **archive_targets.LONGEST_BYTES,
}
