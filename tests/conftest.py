"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest

from cluster.ray_session import RaySession, ray_session


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RaySession]:
    """One private Ray of four logical CPUs for the whole test run, started by the first test that asks."""
    with ray_session(logical_cpus=4) as session:
        yield session
