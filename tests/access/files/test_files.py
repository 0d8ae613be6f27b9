# SPDX-License-Identifier: Apache-2.0
"""Single files out of an archive: what comes out is what went in, and nothing goes elsewhere."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from tests.machine import LIMIT_S, VMAPIPE, Need, bad, good, run
from vmapipe.access.files.copies import FileWriter, FolderWriter, TarWriter
from vmapipe.access.files.messages import FILE, FOLDER, LINK, Entry, FileData, Stretch
from vmapipe.runtime.errors import Failure

ODD = b"new\nline \xff"


def fill(folder: Path) -> None:
    """Files as they are found on real disks, and some that are not."""
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/fstab").write_text("/dev/vda1 / ext4\n")
    (folder / "large").write_bytes(random.Random(1).randbytes(3_000_001))
    (folder / "empty").touch()
    (folder / "link").symlink_to("etc/fstab")
    (folder / "long").symlink_to("x" * 200)
    os.link(folder / "large", folder / "second")
    with (folder / "sparse").open("wb") as file:
        file.seek(20_000_000)
        file.write(b"in the middle")
        file.truncate(30_000_000)
    os.setxattr(folder / "etc/fstab", "user.colour", b"blue")
    (folder / "large").chmod(0o640)
    os.utime(folder / "large", ns=(10**18, 10**18))
    with open(os.fsencode(folder) + b"/" + ODD, "wb") as file:
        file.write(b"odd")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "tree"
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def archive(tree: Path, need: Need) -> Path:
    """Disk `whole`: a file system on all of it; disk `parts`: the same in its second partition."""
    (mke2fs,) = need("mke2fs")
    whole, parts, path = tree.parent / "whole", tree.parent / "parts", tree.parent / "vm.vma.zst"
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tree, whole, "40M"], check=True)
    blocks = whole.stat().st_size // 512
    table = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 2048)
    table += struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 4096, blocks)
    with parts.open("wb") as disk:
        disk.write(bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa")
        disk.seek(4096 * 512)
        disk.write(whole.read_bytes())
    good(*("backup", "--quiet", "--compress", "zstd"), "--disk", whole, "--disk", parts, path)
    return path


def files(*words: str | Path) -> bytes:
    return good("files", *words)


def test_disks_partitions_and_file_systems_are_listed(archive: Path) -> None:
    rows = [json.loads(line) for line in files("ls", "--json", archive).splitlines()]
    assert [(row["disk"], row["partition"], row["kind"], row["readable"]) for row in rows] == [
        ("whole", "", "ext4", True),
        ("parts", "1", "", False),
        ("parts", "2", "ext4", True),
    ]


def test_a_tar_stream_holds_all_that_the_tree_held(
    archive: Path, tree: Path, tmp_path: Path
) -> None:
    raw = files("tar", archive, "parts:2:/")
    assert len(raw) < 4_000_000  # the holes are holes
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        found = {member.name: member for member in tar}
        assert set(found) == {".", "lost+found"} | {
            os.fsdecode(os.path.relpath(os.path.join(where, name), os.fsencode(tree)))
            for where, folders, names in os.walk(os.fsencode(tree))
            for name in folders + names
        }
        assert found["link"].linkname == "etc/fstab"
        assert found["long"].linkname == "x" * 200
        assert found["large"].mode == 0o640
        assert found["large"].mtime == 10**9
        assert found["second"].islnk() or found["large"].islnk()
        assert found["etc/fstab"].pax_headers["SCHILY.xattr.user.colour"] == "blue"
        for name in ("sparse", "etc/fstab", os.fsdecode(ODD)):
            content = tar.extractfile(found[name])
            assert content is not None
            assert content.read() == (tree / name).read_bytes()


def test_gnu_tar_makes_of_the_stream_what_was_there(
    archive: Path, tree: Path, need: Need, tmp_path: Path
) -> None:
    (tar,) = need("tar")
    subprocess.run([tar, "-x", "-C", tmp_path], input=files("tar", archive, "whole:/"), check=True)
    (tmp_path / "lost+found").rmdir()
    subprocess.run(["diff", "-r", "--no-dereference", tree, tmp_path], check=True)
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 1_000_000
    assert (tmp_path / "large").samefile(tmp_path / "second")


def test_hard_links_in_the_stream_have_no_content(archive: Path) -> None:
    """bsdtar would take the next entry for it."""
    with tarfile.open(fileobj=io.BytesIO(files("tar", archive, "whole:/"))) as tar:
        links = [member for member in tar if member.islnk()]
    assert links
    assert not any(member.size for member in links)


def test_a_folder_is_copied_with_modes_times_links_and_holes(
    archive: Path, tree: Path, tmp_path: Path
) -> None:
    files("cp", archive, "whole:/", tmp_path / "copy")
    copy = tmp_path / "copy"
    (copy / "lost+found").rmdir()
    subprocess.run(["diff", "-r", "--no-dereference", tree, copy], check=True)
    assert (copy / "sparse").stat().st_blocks * 512 < 1_000_000
    assert (copy / "large").samefile(copy / "second")
    assert (copy / "large").stat().st_mode & 0o7777 == 0o640
    assert (copy / "large").stat().st_mtime_ns == 10**18
    files("cp", archive, "whole:/etc", tmp_path)
    assert (tmp_path / "etc/fstab").read_bytes() == (tree / "etc/fstab").read_bytes()
    assert "exists already" in bad("files", "cp", archive, "whole:/etc", tmp_path)


def test_one_file_goes_to_standard_output_and_its_holes_are_zeroes(
    archive: Path, tree: Path
) -> None:
    assert files("cat", archive, "whole:/sparse") == (tree / "sparse").read_bytes()
    assert "is not a file" in bad("files", "cat", archive, "whole:/etc")


def test_names_are_exact_for_programs_and_escaped_for_people(archive: Path) -> None:
    assert b"/" + ODD in files("find", "-0", archive, "whole:/").split(b"\0")
    assert rb"new\nline \xff" in files("ls", archive, "whole:/").splitlines()
    names = [
        json.loads(row)["path"] for row in files("ls", "--json", archive, "whole:/").splitlines()
    ]
    assert b"/" + ODD in [os.fsencode(name) for name in names]


def test_a_place_that_is_not_there_or_not_clear_is_one_line(archive: Path) -> None:
    assert "no file system here has '/nope'" in bad("files", "ls", archive, "/nope")
    assert "say which of whole:, parts:2:" in bad("files", "ls", archive, "/etc", code=2)
    assert "there is 'whole', 'parts'" in bad("files", "ls", archive, "sda:/", code=2)
    assert "not a valid place" in bad("files", "ls", archive, "etc", code=2)
    assert "needs a PLACE" in bad("files", "cat", archive, code=2)
    assert "no file system here has" in bad("files", "ls", archive, "whole:/etc/../etc")


def test_changes_that_are_in_the_journal_only_are_seen(need: Need, tmp_path: Path) -> None:
    mke2fs, debugfs = need("mke2fs", "debugfs")
    image, content = tmp_path / "disk", tmp_path / "content"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"old" * 100)
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tmp_path / "tree", image, "16M"], check=True)
    place = subprocess.check_output([debugfs, "-R", "blocks /file", image]).split()[0].decode()
    content.write_bytes((b"new" * 100).ljust(1024, b"\0"))
    script = f"jo\njw -b {place} {content}\njc\n"
    subprocess.run([debugfs, "-w", image], input=script.encode(), check=True, capture_output=True)
    good("backup", "--quiet", "--disk", image, tmp_path / "vm.vma")
    assert files("cat", tmp_path / "vm.vma", "/file") == b"new" * 100


def test_a_journal_that_cannot_be_replayed_is_told(need: Need, tmp_path: Path) -> None:
    mke2fs, debugfs = need("mke2fs", "debugfs")
    image = tmp_path / "disk"
    subprocess.run([mke2fs, "-q", "-t", "ext4", image, "16M"], check=True)
    subprocess.run(
        [debugfs, "-w", "-R", "feature needs_recovery", image], check=True, capture_output=True
    )
    first = subprocess.check_output([debugfs, "-R", "blocks <8>", image]).split()[0]
    size = 1024
    with image.open("r+b") as disk:
        disk.seek(int(first) * size)
        disk.write(bytes(size))
    good("backup", "--quiet", "--disk", image, tmp_path / "vm.vma")
    done = run("files", "ls", tmp_path / "vm.vma", "/")
    assert done.returncode == 0
    assert b"may be missing or old" in done.stderr


@pytest.mark.parametrize("kind", ["ntfs", "fat32"])
def test_file_systems_of_windows_are_read(kind: str, need: Need, tmp_path: Path) -> None:
    image, content = tmp_path / "disk", tmp_path / "content"
    content.write_bytes(random.Random(2).randbytes(1_234_567))
    with image.open("wb") as disk:
        disk.truncate(40 << 20)
    if kind == "ntfs":
        mkntfs, ntfscp = need("mkntfs", "ntfscp")
        subprocess.run([mkntfs, "-q", "-F", image], check=True, capture_output=True)
        subprocess.run([ntfscp, "-q", image, content, "/A long name.bin"], check=True)
    else:
        mkfs, mcopy = need("mkfs.fat", "mcopy")
        subprocess.run([mkfs, "-F", "32", image], check=True, capture_output=True)
        subprocess.run([mcopy, "-i", image, content, "::A long name.bin"], check=True)
    archive = tmp_path / "vm.vma"
    good("backup", "--quiet", "--disk", image, archive)
    assert files("ls", archive, "/").splitlines() == [b"A long name.bin"]
    assert files("cat", archive, "/A long name.bin") == content.read_bytes()
    good("files", "cp", archive, "/", tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o500 == 0o500, (
        "a copy of the root can be looked into"
    )


def test_a_file_system_that_is_not_read_here_is_named_with_a_way_out(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"XFSB".ljust(1 << 20, b"\0"))
    good("backup", "--quiet", "--disk", disk, tmp_path / "vm.vma")
    text = bad("files", "ls", tmp_path / "vm.vma", "/etc")
    assert "disk: (xfs)" in text
    assert "guestfish" in text


def test_what_only_kernels_read_of_ext4_is_not_called_damaged(need: Need, tmp_path: Path) -> None:
    (mke2fs,) = need("mke2fs")
    disk = tmp_path / "disk"
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-O", "bigalloc", disk, "40M"], check=True)
    good("backup", "--quiet", "--disk", disk, tmp_path / "vm.vma")
    (row,) = files("ls", "--json", tmp_path / "vm.vma").splitlines()
    assert json.loads(row)["kind"] == "ext4"


def test_damage_costs_the_files_that_it_is_in_and_no_other(need: Need, tmp_path: Path) -> None:
    (mke2fs,) = need("mke2fs")
    tree, disk, archive = tmp_path / "tree", tmp_path / "disk", tmp_path / "vm.vma"
    tree.mkdir()
    for index, name in enumerate("abc"):
        (tree / name).write_bytes(random.Random(index).randbytes(8 << 20))
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tree, disk, "40M"], check=True)
    good("backup", "--quiet", "--disk", disk, archive)
    raw = bytearray(archive.read_bytes())
    raw[raw.index((tree / "b").read_bytes()[4 << 20 : (4 << 20) + 64])] ^= 1
    archive.write_bytes(raw)
    for name in "ac":
        assert files("cat", archive, f"/{name}") == (tree / name).read_bytes()
    assert run("files", "cat", archive, "/b").returncode == 1
    done = run("files", "tar", archive, "/")
    assert done.returncode == 1
    assert b"its digest differs" in done.stderr
    assert b"'/b': " in done.stderr
    assert b"are zeroes in the tar stream" in done.stderr
    assert b"Traceback" not in done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.extractfile("c").read() == (tree / "c").read_bytes()  # type: ignore[union-attr]


def test_a_parser_that_dies_is_one_failed_command(
    archive: Path, need: Need, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [*VMAPIPE, "files", "cat", str(archive), "whole:/large"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # the rest does not fit into the pipe, so it waits for us
        (parser,) = psutil.Process(process.pid).children()
        parser.suspend()
        parser.send_signal(signal.SIGKILL)
        _, words = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert b"failed: it has ended by signal 9" in words
    assert b"Traceback" not in words


def test_the_parser_ends_with_its_parent(archive: Path) -> None:
    with subprocess.Popen(
        [*VMAPIPE, "files", "cat", str(archive), "whole:/large"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        (parser,) = psutil.Process(process.pid).children()
        parser.suspend()
        process.kill()
        parser.wait(LIMIT_S)


def test_it_needs_no_capability(archive: Path, tree: Path, need: Need) -> None:
    (setpriv,) = need("setpriv")
    words = [setpriv, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *VMAPIPE]
    if os.geteuid():
        words = [*VMAPIPE]  # it has none to begin with
    assert (
        good("files", "cat", archive, "whole:/etc/fstab", tool=words)
        == (tree / "etc/fstab").read_bytes()
    )


# --- a parser that has been taken over ---


def entry(path: bytes, kind: int = FILE, size: int = 0, target: bytes = b"") -> Entry:
    return Entry(path, kind, 0o644, 0, 0, size, 0, 1, 1, 0, target, ())


@pytest.mark.parametrize(
    "path",
    [b"/top/../../evil", b"/evil", b"/top/./x", b"/top//x", b"/top/x\0y", b"evil", b"/topevil/x"],
)
def test_no_name_that_a_parser_tells_leads_out_of_the_folder(path: bytes, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    writer = FolderWriter(fd, b"/top", b"top", print)
    writer.entry(entry(b"/top", FOLDER))
    with pytest.raises(Failure):
        writer.entry(entry(path))
    writer.close()
    os.close(fd)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["top"]


def test_nothing_is_written_through_a_link_that_came_from_the_archive(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "to").mkdir()
    (outside / "file").write_bytes(b"ours")
    fd = os.open(tmp_path / "to", os.O_RDONLY)
    writer = FolderWriter(fd, b"/top", b"top", print)
    writer.entry(entry(b"/top", FOLDER))
    writer.entry(entry(b"/top/way", LINK, target=os.fsencode(outside)))
    with pytest.raises(Failure):
        writer.entry(entry(b"/top/way/file"))
    # A folder, and a file, of the link's name: left out with what is in them.
    for kind in (FOLDER, FILE):
        writer.entry(entry(b"/top/way", kind))
        writer.entry(entry(b"/top/way/file", size=3))
        writer.stretch(Stretch(0, 3))
        writer.data(FileData(0, b"bad"))
    writer.close()
    os.close(fd)
    assert not writer.is_whole
    assert (outside / "file").read_bytes() == b"ours"
    assert len(list(outside.iterdir())) == 1


def test_a_name_that_the_folder_cannot_hold_costs_that_entry_and_no_other(tmp_path: Path) -> None:
    told: list[str] = []
    fd = os.open(tmp_path, os.O_RDONLY)
    writer = FolderWriter(fd, b"/top", b"top", told.append)
    long = b"/top/" + "漢".encode() * 100  # NTFS has 255 letters in a name, Linux 255 bytes
    writer.entry(entry(b"/top", FOLDER))
    writer.entry(entry(long, FOLDER))
    writer.entry(entry(long + b"/in it"))
    writer.entry(entry(b"/top/twin"))
    writer.entry(entry(b"/top/twin"))  # what a folder that takes "twin" for "Twin" answers, too
    writer.entry(entry(b"/top/last"))
    writer.close()
    os.close(fd)
    assert not writer.is_whole
    assert sorted(path.name for path in (tmp_path / "top").iterdir()) == ["last", "twin"]
    assert ["cannot make" in told[0], "exists already" in told[1], len(told)] == [True, True, 2]


def test_a_link_or_an_attribute_that_nothing_can_hold_costs_only_itself(tmp_path: Path) -> None:
    told: list[str] = []
    fd = os.open(tmp_path, os.O_RDONLY)
    out = io.BytesIO()
    writers = FolderWriter(fd, b"/top", b"top", told.append), TarWriter(out, b"/top", told.append)
    odd = (b"user.a=b", b"1", b"user.nul\0", b"2", b"user.%", b"3", b"user.\xff", b"4")
    for writer in writers:
        writer.entry(entry(b"/top", FOLDER))
        writer.entry(entry(b"/top/empty", LINK))
        writer.entry(entry(b"/top/nul", LINK, target=b"a\0b"))
        writer.entry(entry(b"/top/file")._replace(xattrs=odd))
        writer.close()
        assert not writer.is_whole
    os.close(fd)
    assert len([text for text in told if "leads nowhere" in text]) == 4
    assert [path.name for path in (tmp_path / "top").iterdir()] == ["file"]
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        headers = tar.getmember("top/file").pax_headers
    assert {f"SCHILY.xattr.user.{name}" for name in ("a%3Db", "%25", "")} == set(headers)


def test_a_file_of_an_exbibyte_and_more_is_a_hole_or_is_told(tmp_path: Path) -> None:
    for size in (1 << 60, (1 << 64) - 1):
        told: list[str] = []
        folder = tmp_path / str(size)
        folder.mkdir()
        fd = os.open(folder, os.O_RDONLY)
        writer = FolderWriter(fd, b"/top", b"top", told.append)
        writer.entry(entry(b"/top", FOLDER))
        writer.entry(entry(b"/top/huge", size=size))
        writer.stretch(Stretch(4096, 5))
        writer.data(FileData(4096, b"there"))
        writer.entry(entry(b"/top/next"))
        writer.close()
        os.close(fd)
        assert (folder / "top/next").exists()
        assert (folder / "top/huge").read_bytes()[4096:4101] == b"there" if told else True
        assert writer.is_whole == (not told)
        out = io.BytesIO()
        tar = TarWriter(out, b"/top", told.append)
        tar.entry(entry(b"/top/huge", size=size))
        tar.stretch(Stretch(4096, 5))
        tar.data(FileData(4096, b"there"))
        tar.close()
        assert len(out.getvalue()) <= 1 << 16


@pytest.mark.parametrize(
    ("stretches", "data"),
    [
        ([Stretch(0, 10)], [FileData(5, b"x")]),
        ([Stretch(0, 10)], [FileData(0, b"x" * 11)]),
        ([], [FileData(0, b"x")]),
        ([Stretch(0, 11)], []),
        ([Stretch(5, 2), Stretch(0, 2)], []),
    ],
)
def test_content_that_was_not_announced_is_refused(
    stretches: list[Stretch], data: list[FileData]
) -> None:
    for writer in (FileWriter(io.BytesIO()), TarWriter(io.BytesIO(), b"/f", print)):
        writer.entry(entry(b"/f", size=10))

        def feed(writer: FileWriter | TarWriter = writer) -> None:
            for stretch in stretches:
                writer.stretch(stretch)
            for piece in data:
                writer.data(piece)

        with pytest.raises(Failure):
            feed()


def test_without_the_extra_it_says_what_to_install(archive: Path) -> None:
    program = "import sys; sys.modules['pytsk3'] = None; from vmapipe.control.main import main; sys.exit(main(['files', 'ls', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", program, archive], capture_output=True, timeout=LIMIT_S
    )
    assert done.returncode == 2
    assert b"pip install 'vmapipe[files]'" in done.stderr


# --- as a newcomer would ask ---


@pytest.fixture(scope="module")
def debian(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system's root whose /bin is a link, as of today."""
    (mke2fs,) = need("mke2fs")
    folder = tmp_path_factory.mktemp("debian")
    tree = folder / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "etc/ssh").mkdir(parents=True)
    (tree / "usr/bin/tool").write_bytes(b"a tool")
    (tree / "bin").symlink_to("usr/bin")
    (tree / "etc/motd").symlink_to("../usr/bin/tool")
    (tree / "etc/round").symlink_to("round")
    (tree / "etc/gone").symlink_to("/run/gone")
    (tree / "etc/ssh/Sshd.CONF").touch()
    (tree / "etc/fstab.conf").touch()
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tree, folder / "sda", "8M"], check=True)
    good("backup", "--quiet", "--disk", folder / "sda", folder / "vm.vma")
    return folder / "vm.vma"


def test_links_are_followed_on_the_way_and_by_cat_to_the_end(debian: Path) -> None:
    assert files("cat", debian, "/bin/tool") == b"a tool"
    assert files("cat", debian, "/etc/motd") == b"a tool"
    assert files("ls", debian, "/bin") == b"bin\n"
    assert "is a link to '/run/gone': there is no such file" in bad(
        "files", "cat", debian, "/etc/gone"
    )
    assert "round in a circle" in bad("files", "cat", debian, "/etc/round")


def test_a_place_without_a_path_is_all_of_it_as_ls_shows_it(debian: Path) -> None:
    listed = files("ls", debian, "/").splitlines()
    assert b"etc" in listed
    for place in ("sda", "sda:", "sda:/"):
        assert files("ls", debian, place).splitlines() == listed
    assert "not a valid place" in bad("files", "ls", debian, "etc/ssh", code=2)


def test_names_are_found_by_patterns(debian: Path) -> None:
    def found(*words: str) -> list[bytes]:
        return sorted(files(words[0], *words[1:], debian, "/etc").splitlines())

    assert found("find", "--name", "*.conf") == [b"/etc/fstab.conf"]
    assert found("find", "--iname", "*.conf") == [b"/etc/fstab.conf", b"/etc/ssh/Sshd.CONF"]
    assert found("find", "--name", "/etc/ssh/*", "--name", "mo?d") == [
        b"/etc/motd",
        b"/etc/ssh/Sshd.CONF",
    ]
    assert found("ls", "-R", "--iname", "*.conf") == found("find", "--iname", "*.conf")
    assert found("ls", "--name", "*.conf") == [b"fstab.conf"]
    assert "--name" in bad("files", "tar", "--name", "x", debian, "/", code=2)
