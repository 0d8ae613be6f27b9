# SPDX-License-Identifier: Apache-2.0
"""fleet.toml: what it says is understood, and each mistake is told with its line and the way out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.fleet.ansible import AnsibleHost, read_hosts
from vmapipe.fleet.configuration import ConfigurationMistakes, check_references, load, parse
from vmapipe.fleet.inventory import FleetMachine
from vmapipe.runtime.errors import UsageError

WHOLE = """\
[defaults]
every = "1d"
window = ["22:00-06:00", "Sat,Sun 00:00-24:00"]
time_zone = "Europe/Berlin"
target = "b1"
keep = { last = 3, daily = 7 }
verify_every = "7d"
drill_every = "30d"
[limits]
total = 10
[host.pve1]
ssh = "root@pve1"
jobs = 3
guests = ["proxmox", "qmp:/run/vm/*.qmp"]
[storage.ceph1]
jobs = 6
[target.b1]
archiver = "tcp://b1:7777"
keys = "/etc/vmapipe/keys"
host = "pve1"
directory = "/srv/vmapipe/{host}"
[target.off]
s3 = "s3://offsite/vm"
copy_from = "b1"
[vm."web*"]
every = "4h"
priority = 10
[vm."tag:no-backup"]
skip = "told by the owner"
[vm."web-old"]
every = "never mind"
"""


def mistakes_of(text: str) -> list[str]:
    with pytest.raises(ConfigurationMistakes) as caught:
        parse(text.encode())
    return caught.value.lines


def test_a_whole_file_is_understood_and_the_later_rule_wins() -> None:
    fleet, _ = parse(WHOLE.replace('"never mind"', '"12h"').encode())
    assert (fleet.total, fleet.hosts["pve1"].jobs, fleet.storages["ceph1"].jobs) == (10, 3, 6)
    assert [t.name for t in fleet.copies_of("b1")] == ["off"]
    policies = [
        fleet.policy(FleetMachine(*words))
        for words in (("db", "pve1"), ("web1", "pve1"), ("web-old", "pve1"))
    ]
    assert [p.every_s / 3600 for p in policies] == [24, 4, 12]
    assert [p.priority for p in policies] == [0, 10, 10]
    tagged = FleetMachine("db", "pve1", tags=("no-backup",))
    assert fleet.policy(tagged).skip == "told by the owner"
    titled = FleetMachine("vzdump-qemu-100", "pve1", title="web7")
    assert fleet.policy(titled).every_s == 4 * 3600


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = WHOLE.replace("jobs = 3", "job = 3").replace('host = "pve1"', 'hots = "pve1"')
    text = text.replace("last = 3", "newest = 3").replace("total = 10", "total = -1")
    lines = mistakes_of(text + "[hosts.x]\n")
    assert [line.split(": ")[0] for line in lines] == [
        f"fleet.toml:{n}" for n in (6, 10, 13, 20, 31, 32)
    ]
    joined = "\n".join(lines)
    for words in ("like { last = 3", "from 0 to 100000", "is jobs meant?", "is host meant?"):
        assert words in joined
    assert "'never mind' is not a time such as 30m" in joined
    assert "[hosts] is not a part of this file: is host meant?" in joined


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('[host."-oProxyCommand=x"]', "is not a name for a host"),
        ('[host.a]\nssh = "-oProxyCommand=touch /x"', "is not valid here"),
        ('[host.a]\nssh = "root@-oProxyCommand=x"', "is not valid here"),
        ('[host.a]\nssh = "root@b;reboot"', "is not valid here"),
        ('[host.a]\nguests = "exec:ls"', "is not a way to find machines"),
        ('[host.a]\ncommand = ["--x"]', "begin with a dash"),
        ('[target.a]\ndirectory = "srv"', "not an absolute path"),
        ('[target.a]\ndirectory = "/srv/../etc"', "not an absolute path"),
        ('[target.a]\narchiver = "tcp://x:1"', "needs keys"),
        ("[target.a]\njobs = 1", "needs archiver, directory or s3"),
        ('[target.a]\ns3 = "S3://x"', "is not like s3://"),
        ('[defaults]\ntime_zone = "Mars/Base"', "not a time zone"),
        ('[defaults]\nwindow = "10-12"', "is not a window"),
        ('[defaults]\ntarget = "b2"', "is not a target (targets: none)"),
        ("[defaults]\nkeep = 3", "like { last = 3"),
        ("[defaults]\nkeep = { newest = 3 }", "like { last = 3"),
        ("[defaults]\nevery = 4", "in quotes"),
        ('[defaults]\nspeed = "fast"', "not a valid size"),
        ("[defaults]\nevery = ", "not valid TOML"),
        ("host = 3", "has to be tables"),
        ("[host]\na = 3", "has to be a table"),
        ("[defaults]\nfreeze = 1", "true or false"),
        ("[ansible]\njobs = 1", "needs inventory"),
        ("[defaults]\nevery = 4", 'such as "1d"'),
        ('[defaults]\nevery = "9999999w"', "more than 10 years"),
        ("[defaults]\nwindow = {}", 'such as "22:00-06:00"'),
        ("[defaults]\nkeep = { last = 0 }", "keeps nothing at all"),
        ('[defaults]\ndisks = "sda,sdb"', 'several are a list: ["vda", "vdb"]'),
        ('[defaults]\nexclude = ["a b"]', "is not a disk's name"),
        ('[host.a]\nssh = "root@a:22"', "ssh://root@a:22"),
        ('[target.a]\narchiver = "tcp://x:99999"', "a port that there is not"),
        ('[target.a]\ndirectory = "/b/{hots}"', "{host} alone"),
        ('[fleet]\ndatabase = "b1:5432"', "is not like postgresql://"),
        ('[vm.""]', "fits no machine"),
        ('[vm."tag:"]', "fits no machine"),
        ('[vm."tags:x"]', "is tag: meant?"),
        ("[vm.web*]", 'stands in quotes: [vm."web*"]'),
        ("[vm.web]\nskip = told by him", "a text stands in quotes"),
        ("[vm.web]\n[vm.web]", "the two have to be one"),
        ("a = " + "[" * 3000, "lists in lists"),
    ],
)
def test_each_kind_of_mistake_is_told_in_words(line: str, words: str) -> None:
    assert words in mistakes_of(line)[0]
    assert mistakes_of(line)[0].startswith("fleet.toml:")


def test_copies_are_made_of_what_backups_have_stored() -> None:
    targets = "".join(
        f'[target.{name}]\ndirectory = "/{name}"\ncopy_from = "{source}"\n'
        for name, source in (("a", "b"), ("b", "a"), ("c", "c"))
    )
    lines = mistakes_of(targets)
    assert ["takes copies itself: name what it copies" in line for line in lines] == [True] * 3


def test_a_mark_that_an_editor_has_put_at_the_begin_is_none_of_the_file() -> None:
    fleet, _ = parse(b"\xef\xbb\xbf[limits]\ntotal = 3\n")
    assert fleet.total == 3


def test_rules_that_fit_no_machine_are_known() -> None:
    fleet, _ = parse(b'[vm."web*"]\npriority = 1\n[vm."tag:x"]\npriority = 1\n')
    assert [r.pattern for r in fleet.unused_rules([FleetMachine("web1", "a")])] == ["tag:x"]


@given(st.binary(max_size=200))
def test_whatever_is_in_the_file_it_is_understood_or_told(data: bytes) -> None:
    with contextlib.suppress(ConfigurationMistakes):
        parse(data)


def test_a_file_that_is_not_there_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--file"):
        load(str(tmp_path / "fleet.toml"))


def test_hosts_without_a_use_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[host.a]\njobs = 1\n[host.b]\n[target.x]\ndirectory = "/x"\nhost = "b"\n')
    fleet, _ = load(str(path))
    with pytest.raises(ConfigurationMistakes, match=r"fleet.toml:1: host a has no machines"):
        check_references(fleet, str(path))


def test_hosts_that_nobody_has_are_told() -> None:
    fleet, _ = parse(b'[target.a]\ndirectory = "/x"\nhost = "b1"\n')
    with pytest.raises(ConfigurationMistakes) as caught:
        check_references(fleet, "fleet.toml")
    assert ["no hosts" in caught.value.lines[0], "b1" in caught.value.lines[1]] == [True, True]


# --- Ansible ---

INI = """\
# a comment
alone ansible_connection=local
[pve]
pve[01:03] ansible_user=root
[stores]
b1 ansible_host=10.0.0.9 ansible_port=2222
[all:vars]
ansible_user=backup
[everything:children]
pve
stores
"""
YAML = """\
all:
  vars: {ansible_user: backup}
  children:
    pve:
      hosts:
        pve[01:03]: {ansible_user: root}
    stores:
      hosts: {b1: {ansible_host: 10.0.0.9, ansible_port: 2222}}
"""
JSON = """{"_meta": {"hostvars": {"b1": {"ansible_host": "10.0.0.9", "ansible_port": 2222}}},
"all": {"children": ["pve", "stores"], "vars": {"ansible_user": "backup"}},
"pve": {"hosts": ["pve01", "pve02", "pve03"], "vars": {"ansible_user": "root"}},
"stores": {"hosts": ["b1"]}}"""
PVE = [AnsibleHost(f"pve0{n}", f"root@pve0{n}") for n in (1, 2, 3)]
B1 = AnsibleHost("b1", "ssh://backup@10.0.0.9:2222")


@pytest.mark.parametrize(("name", "text"), [("hosts", INI), ("h.yml", YAML), ("h.json", JSON)])
def test_an_inventory_gives_the_same_hosts_in_each_form(
    name: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_hosts(str(path), "pve") == PVE
    assert read_hosts(str(path), "stores") == [B1]
    every = [h for h in read_hosts(str(path)) if h.name != "alone"]
    assert sorted(every) == sorted([*PVE, B1])


def test_an_inventory_of_ten_thousand_hosts_takes_no_time_that_grows_with_its_square(
    tmp_path: Path,
) -> None:
    groups = "".join(f"[g{n}]\nh{n}[000:099] ansible_port=2222\n" for n in range(100))
    (tmp_path / "hosts").write_text(groups.replace(":099]", ":098]", 1) + "x:23\n")
    found = read_hosts(str(tmp_path / "hosts"))
    assert (len(found), found[-1]) == (10_000, AnsibleHost("x", "ssh://x:23"))


def test_a_local_host_of_an_inventory_needs_no_ssh(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(INI)
    assert read_hosts(str(tmp_path / "hosts"), "ungrouped") == [AnsibleHost("alone", "")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("hosts", "[pve\n", "head"),
        ("hosts", "x ansible_host=-oProxyCommand=x\n", "as it is"),
        ("hosts", "x ansible_host={{y}}\n", "as it is"),
        ("hosts", "x[0:999999]\n", "more than"),
        ("hosts", "x" + "[0:9]" * 6 + "\n", "more than"),
        ("hosts", "x[0:9999]\n[b]\ny[0:9999]\n", "more than"),
        ("hosts", "x[5:1]\n", "nothing in it"),
        ("hosts", "x[1:c]\n", "not a range"),
        ("hosts", "../etc\n", "not a name"),
        ("hosts", "[a:foo]\nx\n", "not hosts, vars or children"),
        ("h.json", "[" * 100_000, "head"),
        ("h.json", '{"a": ' + "[" * 100_000, "JSON"),
        ("h.json", '{"a": {"hosts": "x"}}', "not a list"),
        ("h.json", '{"a": ["h\\nx"]}', "not a name"),
        ("h.json", '{"_meta": {"hostvars": {"x": {"ansible_port": NaN}}}, "a": ["x"]}', "as it is"),
        ("h.yml", "all:\n  hosts: [x]\n", "not a list"),
        ("h.yml", "- x\n", "not an inventory"),
        ("h.yml", "all: &a\n  children: {b: *a}\n", "groups within groups"),
        ("h.yml", "a: " + "[" * 1000 + "]" * 1000, "YAML"),
        ("h.yml", "all: {hosts: {x: {ansible_user: !vault a}}}\n", "ansible-inventory --list"),
        ("h.json", "{", "JSON"),
        ("h.json", "{}", "no group"),
        ("h.yml", "a: [", "YAML"),
    ],
)
def test_an_inventory_with_a_mistake_is_told(
    name: str, text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        read_hosts(str(tmp_path / name), "all" if "group" not in words else "pve")
