# SPDX-License-Identifier: Apache-2.0
"""The processes of one backup: with which words each is started, and what a killed one leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmapipe.control.outputwords import is_path
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Children
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import OwnFolder

if TYPE_CHECKING:
    from vmapipe.control.job import BackupJob, Disk


def start_archiver(
    job: BackupJob, children: Children, folder: OwnFolder, emit: Emit, cancel: Cancel
) -> None:
    if job.service:
        module = "vmapipe.control.remote"
        words = [f"--archiver={job.service.endpoint}", *job.service.link_options]
    else:
        module = "vmapipe.archiver.main"
        words = [f"--listen={_socket_in(folder)}"]
        if job.priorities.nice is None and any(disk.guard for disk in job.disks):
            words.append("--stand-back")
    # With "=", because a name may begin with a dash.
    words += [f"--output={job.archive}", f"--job={job.job_id.hex()}"]
    words += [f"--device={name}" for name in job.names]
    words += job.archiver_options
    archiver = children.start("the archiver", module, words, job.pass_fds)
    job.priorities.apply(archiver.pid, guest_waits=False)
    if job.service:
        # Imported here: most archives are made on this host.
        from vmapipe.control.elsewhere import await_opened

        await_opened(children, archiver, emit, cancel)


def start_producers(job: BackupJob, children: Children, folder: OwnFolder, speed: int) -> None:
    if job.machine:
        job.machine.prepare(speed)
    if job.service:
        common = [f"--archiver={job.service.endpoint}", *job.service.link_options]
    else:
        common = [f"--archiver={_socket_in(folder)}"]
    common.append(f"--job={job.job_id.hex()}")
    for index, disk in enumerate(job.disks):
        words = [*common, f"--name={disk.name}"]
        more, fds = _words_of(job, index, disk)
        words += [f"--speed={speed}", *more]
        name = f"the producer of {disk.name!r}"
        child = children.start(name, "vmapipe.producer.main", words, fds)
        job.priorities.apply(child.pid, guest_waits=bool(disk.guard or job.machine))
    if job.machine and job.with_memory:
        words = [*common, *job.buffer_options]
        more, fds = job.machine.stream_arguments()
        name = "the producer of the machine's memory"
        child = children.start(name, "vmapipe.producer.main", [*words, *more], fds)
        job.priorities.apply(child.pid, guest_waits=True)
    if job.machine:
        job.machine.protect(children.all[1:])
        children.watch(job.machine.fd)


def _words_of(job: BackupJob, index: int, disk: Disk) -> tuple[list[str], list[int]]:
    """Where a producer gets its disk from, and the descriptors that it needs for that."""
    if job.machine:
        fd = job.machine.sink_fd(index)
        words = [f"--disk={disk.name}", f"--sink-fd={fd}", f"--size={disk.size_bytes}"]
        return [*words, "--await-job", *job.buffer_options], [fd]
    words = [f"--disk={disk.path}", *disk.reading]
    if disk.guard:
        words += [f"--guard={disk.guard}", *job.buffer_options]
    return words, []


def remove_leftovers(job: BackupJob, children: Children) -> None:
    """What an archiver that was killed could not remove itself."""
    killed = children.all and (children.all[0].exit_code or 0) < 0
    if not killed or job.service:
        return
    for name, upload in job.uploads:
        from vmapipe.archiver.outputs.object import abort_upload

        abort_upload(name, upload)
    # Imported here: it is seldom needed, and a backup starts sooner without.
    from vmapipe.archiver.outputs.file import remove_leftover
    from vmapipe.archiver.outputs.manifests import beside

    named = [w.removeprefix("--manifest=") for w in job.archiver_options if "--manifest=" in w]
    ours = [job.archive, beside(job.archive)] if is_path(job.archive) else []
    for path in (*ours, *filter(is_path, named)):
        remove_leftover(path)


def _socket_in(folder: OwnFolder) -> str:
    return f"ipc://{folder.path}/sock"
