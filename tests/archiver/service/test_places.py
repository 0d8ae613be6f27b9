# SPDX-License-Identifier: Apache-2.0
"""Where a client's archives go, its rules, and what the host has left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmapipe.archiver.service.archivers import WorkFolder
from vmapipe.archiver.service.storage import (
    ClientLimits,
    ClientRules,
    FolderStorage,
    available_memory_bytes,
    is_of_service,
    left_in_group,
    read_client_limits,
)
from vmapipe.protocol import limits, service
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import HeldFolder

REQUEST = service.Open(limits.VERSION, bytes(16), "vm.vma", ("a",))


def places(
    folder: Path, usual: ClientLimits | None = None, rules: Path | None = None
) -> FolderStorage:
    return FolderStorage(str(folder), ClientRules(usual or ClientLimits(), rules, per_client=True))


def test_each_client_has_a_folder_that_only_the_service_can_enter(tmp_path: Path) -> None:
    place = places(tmp_path).place("alice", REQUEST)
    assert place.path == str(tmp_path / "alice" / "vm.vma")
    assert not place.exists
    assert (tmp_path / "alice").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("attributes", [True, False])
def test_a_folder_in_which_clients_choose_the_names_is_known_to_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, attributes: bool
) -> None:
    def refuse(*words: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no attributes here")

    if not attributes:
        monkeypatch.setattr(os, "setxattr", refuse)
    for _ in range(2):
        places(tmp_path).place("alice", REQUEST)
    with HeldFolder(str(tmp_path / "alice")) as held:
        assert is_of_service(held)
    with HeldFolder(str(tmp_path)) as held:
        assert not is_of_service(held)


def test_a_link_in_the_place_of_a_clients_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "alice").symlink_to(tmp_path)
    with pytest.raises(RemoteProtocolError, match="is not a folder"):
        places(tmp_path / "store").place("alice", REQUEST)


@pytest.mark.parametrize("taken", ["vm.vma", "vm.vma.manifest.json"])
def test_a_name_is_taken_by_an_archive_a_manifest_or_a_link_to_nowhere(
    tmp_path: Path, taken: str
) -> None:
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / taken).symlink_to("/nowhere")
    assert places(tmp_path).place("alice", REQUEST).exists


def test_rules_of_a_client_stand_above_the_usual_ones_and_are_read_anew(tmp_path: Path) -> None:
    rules = tmp_path / "clients"
    rules.mkdir()
    there = places(tmp_path, ClientLimits(quota_bytes=1000, max_jobs=5), rules)
    assert there.place("alice", REQUEST)[2:4] == (5, 1000)
    (rules / "alice.toml").write_text('quota = "2K"\ndirectory = "other"\n')
    place = there.place("alice", REQUEST)
    assert place.path == str(tmp_path / "other" / "vm.vma")
    assert place[2:4] == (5, 2048)
    (tmp_path / "other" / "old.vma").write_bytes(bytes(700))
    (tmp_path / "other" / "new.vma.partial").write_bytes(bytes(50))
    assert there.place("alice", REQUEST).used_bytes == there.used_bytes("alice") == 750
    assert there.place("bob", REQUEST).used_bytes == 0


@pytest.mark.parametrize(
    "text",
    [
        'quota = "much"',
        "quota = 5",
        "jobs = 0",
        'jobs = "1"',
        'directory = "../x"',
        'directory = "/x"',
        'directory = ""',
        'folder = "x"',
        "not toml",
        'quota = "1G"',
    ],
)
def test_rules_that_make_no_sense_name_their_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "alice.toml").write_text(text)
    with pytest.raises(Failure, match=r"alice\.toml"):
        read_client_limits(tmp_path / "alice.toml", ClientLimits())
    with pytest.raises(Failure, match=r"alice\.toml"):
        ClientRules(ClientLimits(), tmp_path, per_client=False)


def test_a_control_groups_limit_counts_without_the_pages_that_can_be_dropped(
    tmp_path: Path,
) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert left_in_group(tmp_path, 5000) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_group(tmp_path, 5000) == 5000
    assert left_in_group(tmp_path / "none", 5000) == 5000
    assert available_memory_bytes() > 0


def test_the_folder_of_a_service_that_was_killed_is_removed_and_that_of_a_living_one_is_not(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_folder))
    living = WorkFolder()
    killed = short_folder / "vmapipe-service-killed"
    (killed / "1").mkdir(parents=True)
    (short_folder / "vmapipe-service-link").symlink_to(short_folder)
    second = WorkFolder()
    assert os.path.isdir(living.path)
    assert not killed.exists()
    living.remove()
    second.remove()
    assert [path.name for path in short_folder.iterdir()] == ["vmapipe-service-link"]
