# SPDX-License-Identifier: Apache-2.0
"""A machine's TPM: its state is in the archive, and a TPM that is given it knows what it knew."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.qemu.paused_machine import paused_machine
from tests.control.qemu.software_tpm import swtpm
from tests.machine import LIMIT_S, Need, eventually, good, listens
from vmapipe.control.qemu.tpm import (
    VOLUME_BYTES,
    TpmPlace,
    as_volume,
    check_volume,
    read_volume,
    states_of,
)
from vmapipe.control.qmp.client import QmpClient
from vmapipe.runtime.errors import Failure

NAME = "drive-tpmstate0-backup"
KEY = b"the key!"
# As the TPM 2.0 library has them: tag with a session, length, code. The session is an empty
# password; the place of 8 bytes can be written and read by its owner.
_OWNER, _INDEX = "40000001", "01500001"
_SESSION = "00000009 40000009 0000 00 0000"
DEFINE = (0x12A, f"{_OWNER} {_SESSION} 0000 000e {_INDEX} 000b 02060006 0000 0008")
WRITE = (0x137, f"{_OWNER} {_INDEX} {_SESSION} 0008 {KEY.hex()} 0000")
READ = (0x14E, f"{_OWNER} {_INDEX} {_SESSION} 0008 0000")


def asked(need: Need, folder: Path, state: str, *commands: tuple[int, str]) -> bytes:
    """The answer to the last of the commands to a TPM that has this state."""
    path = folder / "server"
    options = ("--server", f"type=unixio,path={path}", "--flags", "startup-clear")
    answer = b""
    with swtpm(need, folder, state, *options), socket.socket(socket.AF_UNIX) as tpm:
        assert eventually(lambda: listens(path))
        tpm.settimeout(LIMIT_S)
        tpm.connect(str(path))
        for code, words in commands:
            body = bytes.fromhex(words)
            head = b"\x80\x02" + (len(body) + 10).to_bytes(4, "big") + code.to_bytes(4, "big")
            tpm.sendall(head + body)
            answer = tpm.recv(4096)
            assert answer[6:10] == bytes(4), (code, answer)
    path.unlink(missing_ok=True)
    return answer


@pytest.mark.parametrize("kind", ["folder", "volume"])
def test_a_tpm_that_is_given_what_was_backed_up_knows_what_the_machines_tpm_knew(
    qemu: str, need: Need, tmp_path: Path, kind: str
) -> None:
    """Its state is a volume as Proxmox VE's are, wherever swtpm keeps it."""
    (tmp_path / "state").mkdir()
    state = f"dir={tmp_path}/state"
    if kind == "volume":
        (tmp_path / "state.raw").write_bytes(bytes(VOLUME_BYTES))
        state = f"backend-uri=file://{tmp_path}/state.raw"
    asked(need, tmp_path, state, DEFINE, WRITE)
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    options = (
        *("-blockdev", "driver=raw,node-name=a,file.driver=file,file.filename={d}/a.raw"),
        *("-device", "virtio-blk-pci,drive=a,id=virtio0"),
        *("-chardev", "socket,id=tpm,path={d}/control", "-tpmdev", "emulator,id=t0,chardev=tpm"),
        *("-device", "tpm-tis,tpmdev=t0"),
    )
    with swtpm(need, tmp_path, state), paused_machine(need, tmp_path, *options) as machine:
        good("backup", "--qmp", machine.qmp, tmp_path / "vm.vma")
        assert machine.ours() == []
        text = good("backup", "--json", "--qmp", machine.qmp, "--disk", "a", tmp_path / "a.vma")
        events = [json.loads(line) for line in text.splitlines()]
        assert [e["device"] for e in events if e["event"] == "skipped"] == [NAME]
        machine.ask("cont")  # QEMU closes what is given back only while its guest runs
        QmpClient(str(machine.qmp)).close()
        assert eventually(lambda: machine.ask("query-fdsets") == [])
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    restored = tmp_path / "out" / f"disk-{NAME}.raw"
    assert restored.stat().st_size == VOLUME_BYTES
    assert asked(need, tmp_path, f"backend-uri=file://{restored}", READ)[16:24] == KEY


def test_a_tpm_whose_state_cannot_be_had_is_named(qemu: str, need: Need, tmp_path: Path) -> None:
    """Here its swtpm keeps it where nobody else can read it: nowhere, yet."""
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "state").mkdir()
    options = (
        *("-blockdev", "driver=raw,node-name=a,file.driver=file,file.filename={d}/a.raw"),
        *("-device", "virtio-blk-pci,drive=a,id=virtio0"),
        *("-chardev", "socket,id=tpm,path={d}/control", "-tpmdev", "emulator,id=t0,chardev=tpm"),
        *("-device", "tpm-tis,tpmdev=t0"),
    )
    with (
        swtpm(need, tmp_path, f"dir={tmp_path}/state"),
        paused_machine(need, tmp_path, *options) as machine,
    ):
        for left in (tmp_path / "state").iterdir():
            left.unlink()
        text = good("backup", "--qmp", machine.qmp, tmp_path / "vm.vma").decode()
    assert f"not in the archive: {NAME}: the state of the TPM 't0'" in text
    assert "swtpm has not kept any state yet" in text


STATES = st.dictionaries(st.sampled_from(["volatilestate", "savestate"]), st.binary(max_size=5000))


@given(st.binary(min_size=1, max_size=5000), STATES)
def test_states_are_laid_out_so_that_each_is_found(
    permanent: bytes, others: dict[str, bytes]
) -> None:
    states = {"permall": permanent, **others}
    volume = as_volume(states)
    check_volume(volume)
    for index, name in enumerate(("permall", "volatilestate", "savestate")):
        place = 12 + 12 * index
        offset, length = (
            int.from_bytes(volume[place + n : place + n + 4], "little") for n in (0, 4)
        )
        assert volume[offset : offset + length] == states.get(name, b"")
    assert states_of(volume.ljust(VOLUME_BYTES, b"\0")) == {n: s for n, s in states.items() if s}
    with pytest.raises(Failure):
        check_volume(volume[: len(permanent)])


def test_a_state_is_read_as_it_is_when_nobody_changes_it(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="has not kept any state yet"):
        read_volume(TpmPlace(str(tmp_path), is_folder=True))
    (tmp_path / "tpm2-00.permall").write_bytes(b"x" * 1315)
    volume = read_volume(TpmPlace(str(tmp_path), is_folder=True))
    assert len(volume) == VOLUME_BYTES
    (tmp_path / "volume").write_bytes(volume[: 192 + 2048])
    assert read_volume(TpmPlace(str(tmp_path / "volume"), is_folder=False)) == volume
    (tmp_path / "volume").write_bytes(b"\x55" * 4096)
    with pytest.raises(Failure, match="not in the layout"):
        read_volume(TpmPlace(str(tmp_path / "volume"), is_folder=False))
