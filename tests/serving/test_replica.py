"""A replica answers as its settings say, wherever and whenever it starts."""

import pytest

from cluster.client import Client
from cluster.errors import RefusedError
from cluster.home import Home
from cluster.keys import KeyFile
from cluster.ray_session import find_free_port
from serving.replica import resolve_settings
from serving.standby import Standby


@pytest.mark.parametrize("had_keys", [True, False])
def test_a_replica_that_starts_once_the_file_of_keys_is_gone_refuses_everybody(
    versions, home: Home, had_keys: bool
) -> None:
    file, presented = KeyFile(home.keys), None
    if had_keys:
        presented = file.add("shop", "admin")[1]
    settings = resolve_settings(versions.recipe, home, keys_required=not had_keys)  # as the first start was told
    file.path.unlink(missing_ok=True)
    port, ports = find_free_port(), {"stats_port": find_free_port(), "fallback_port": find_free_port()}
    with Standby(settings, "127.0.0.1", port, **ports):
        for key in (None, presented):
            with Client(f"http://127.0.0.1:{port}", key) as client:
                with pytest.raises(RefusedError) as raised:
                    client.recommend("u0")
                assert raised.value.status == 401
                assert client.request("GET", "/healthz") == {"status": "ok"}


def test_keys_are_required_where_there_are_some_at_the_start(versions, home: Home) -> None:
    assert not resolve_settings(versions.recipe, home).keys_required
    KeyFile(home.keys).add("shop", "write")
    assert resolve_settings(versions.recipe, home).keys_required
