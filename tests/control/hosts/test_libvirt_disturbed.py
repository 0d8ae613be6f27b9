# SPDX-License-Identifier: Apache-2.0
"""What people do to a domain while it is backed up. A file of its own, so that the domain is, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.control.hosts.domain_backups import instant_of, words_for
from tests.control.hosts.libvirtd import DomainGuest
from tests.machine import Need, end_of, next_event, started, without_limit


# libvirt refuses each after it has waited for its own lock, half a minute as a rule.
@pytest.mark.soak
def test_what_would_disturb_a_backup_is_refused_and_an_undefined_domain_is_backed_up(
    need: Need, domain: DomainGuest, tmp_path: Path
) -> None:
    libvirtd, archive = domain.libvirtd, tmp_path / "vm.vma"
    inactive = libvirtd("dumpxml", "--inactive", "--security-info", domain.name)
    with started(*words_for(domain, "--json", "--speed", "64K", archive)) as process:
        next_event(process, "instant")
        for words in (
            ("detach-disk", domain.name, "vdb", "--live"),
            ("snapshot-create-as", domain.name, "--disk-only", "--no-metadata"),
            ("managedsave", domain.name),
        ):
            assert libvirtd.try_virsh(*words).returncode == 1, words
        try:
            libvirtd("undefine", domain.name)
            domain.goes_on(1)
            without_limit(process)
            code, said = end_of(process)
        finally:
            libvirtd.define(inactive)
        assert code == 0, said
    domain.is_untouched()
    domain.goes_on(1)
    instant_of(need, archive, tmp_path / "restored")
