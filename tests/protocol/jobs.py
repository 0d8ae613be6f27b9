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
    st.just(limits.VERSION),
    uuids,
    reasons,
    st.lists(names, max_size=5).map(tuple),
    st.lists(st.tuples(config_names, contents), max_size=3).map(tuple),
    reasons,
    st.booleans(),
    st.just(b"") | uuids,
    reasons,
)
of_coordinators: st.SearchStrategy[service.FromCoordinator] = st.one_of(
    opens, st.builds(service.Beat, uuids), st.builds(service.JobCancel, uuids, reasons)
)
of_services: st.SearchStrategy[service.FromService] = st.one_of(
    st.builds(service.Opened, st.just(limits.VERSION), st.integers(1, limits.MAX_HEARTBEAT_S)),
    st.builds(service.JobBegun, uuids, numbers),
    st.builds(service.JobProgress, uints, uints, numbers, numbers),
    st.builds(service.JobNotice, reasons),
    st.builds(service.JobStored, reasons, uuids, uints, uints),
    st.builds(service.JobFailed, reasons),
    st.builds(service.JobRefused, reasons, reasons),
    st.just(service.Alive()),
)
