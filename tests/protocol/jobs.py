# SPDX-License-Identifier: Apache-2.0
"""Messages about jobs, of every kind, for tests to draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.protocol.messages import U64, names, reasons, uuids
from vmapipe.protocol import limits, service

uints = st.integers(0, U64)
numbers = st.lists(uints, max_size=5).map(tuple)
contents = st.binary(max_size=50)
config_names = names.filter(lambda name: "/" not in name)
opens = st.builds(
    service.Open,
    version=st.just(limits.VERSION),
    job=uuids,
    name=reasons,
    devices=st.lists(names, max_size=5).map(tuple),
    configs=st.lists(st.tuples(config_names, contents), max_size=3).map(tuple),
    compress=reasons,
    manifest=st.booleans(),
    uuid=st.just(b"") | uuids,
    program=reasons,
    stable=st.booleans(),
    base=st.booleans(),
    digests=st.booleans(),
    full_every=uints,
    recorded=st.lists(uuids, max_size=3).map(tuple),
    time=st.integers(0, (1 << 63) - 1),
)
of_coordinators: st.SearchStrategy[service.FromCoordinator] = st.one_of(
    opens, st.builds(service.Beat, uuids), st.builds(service.JobCancel, uuids, reasons)
)
of_services: st.SearchStrategy[service.FromService] = st.one_of(
    st.builds(
        service.Opened,
        version=st.just(limits.VERSION),
        heartbeat_s=st.integers(1, limits.MAX_HEARTBEAT_S),
        base=st.just(b"") | uuids,
        name=reasons,
        disks=st.lists(st.tuples(names, uints), max_size=3).map(tuple),
        compares=st.booleans(),
        why=reasons,
    ),
    st.builds(
        service.JobBegun, uuid=uuids, sizes=numbers, full=st.lists(reasons, max_size=3).map(tuple)
    ),
    st.builds(service.JobProgress, uints, uints, numbers, numbers, numbers),
    st.builds(service.JobNotice, reasons),
    st.builds(service.JobStored, reasons, uuids, uints, uints, uints, uints),
    st.builds(service.JobFailed, reasons, st.booleans()),
    st.builds(service.JobRefused, reasons, reasons),
    st.just(service.Alive()),
)
