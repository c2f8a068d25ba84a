"""Who may ask for what: every route of the app, without a key, with wrong ones, and with too small a role."""

import re
import time

import openai
import pytest

from cluster.errors import ConfigError
from cluster.home import Home
from cluster.keys import KeyFile
from serving.access import OPEN, TokenBucket, needed_role
from serving.command import assert_reachable_by_keys_only

ROLES = ("read", "write", "admin")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("locked")).ensure()


@pytest.fixture(scope="module")
def keys(home):
    file = KeyFile(home.keys)
    return {role: file.add(role, role)[1] for role in ROLES}


@pytest.fixture(scope="module")
def locked(run_alone, home, keys):
    with run_alone(home) as served:
        yield served


@pytest.fixture(scope="module")
def routes(locked, keys) -> list[tuple[str, str]]:
    """Every route that the app describes, with its parameters filled in, and those that it does not."""
    described = locked.request("GET", "/openapi.json", key=keys["read"]).body["paths"]
    found = [
        (method.upper(), re.sub(r"\{.*?\}", "i0", path)) for path, methods in described.items() for method in methods
    ]
    assert len(found) >= 11
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs"), ("POST", "/not/there"), ("GET", "/not/there")]


def test_every_route_refuses_whoever_has_no_key_or_a_wrong_one(locked, keys, routes):
    wrong = [None, "nonsense", keys["admin"][:-1] + ("a" if keys["admin"][-1] != "a" else "b"), "rk_000000000000_x"]
    for method, path in routes:
        for key in wrong:
            answer = locked.request(method, path, {}, key=key)
            assert (answer.status == 401) == (path not in OPEN), (method, path, key, answer)
            if path not in OPEN:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert key is None or key not in str(answer.body)


def test_a_key_of_too_small_a_role_is_refused_and_says_which_it_needs(locked, keys, routes):
    refused = 0
    for method, path in routes:
        role = needed_role(method, path)
        for smaller in ROLES[: ROLES.index(role)] if role else ():
            answer = locked.request(method, path, {}, key=keys[smaller])
            assert answer.status == 403, (method, path, answer)
            assert f"needs {role}" in str(answer.body)
            refused += 1
    assert refused >= 6


def test_a_key_of_the_role_that_is_needed_goes_on(locked, keys, routes):
    for method, path in routes:
        role = needed_role(method, path)
        if role:
            assert locked.request(method, path, {}, key=keys[role]).status not in (401, 403), (method, path)


def test_writing_needs_more_than_reading_whatever_is_added_one_day():
    assert (
        needed_role("POST", "/v1/feedback")
        == needed_role("PUT", "/v1/items")
        == needed_role("DELETE", "/v9/x")
        == "write"
    )
    assert needed_role("POST", "/v1/recommend") == needed_role("GET", "/v9/x") == needed_role("GET", "/docs") == "read"
    assert needed_role("GET", "/v1/versions") == needed_role("GET", "/metrics") == "admin"
    assert needed_role("GET", "/v1/users/u1") == "admin"  # what somebody did
    assert needed_role("POST", "/v1/recommend/") == "write"  # not the path that is listed, so the larger role


def test_openai_s_client_hears_of_a_wrong_key_in_its_own_way(locked, keys):
    url = f"{locked.url}/v1"
    assert openai.OpenAI(base_url=url, api_key=keys["read"], max_retries=0).models.list().data
    with pytest.raises(openai.AuthenticationError) as raised:
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    assert raised.value.code == "invalid_api_key"


def test_a_key_that_asks_too_often_waits_and_others_do_not(locked, home, keys):
    slow = KeyFile(home.keys).add("slow", "read", rate_per_s=1)[1]
    locked.wait_for(lambda: locked.request("GET", "/v1/models", key=slow).status == 200)
    answers = [locked.request("GET", "/v1/models", key=slow) for _ in range(6)]
    refused = [answer for answer in answers if answer.status == 429]
    assert len(refused) >= 3
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].body["error"]["code"] == "rate_limit_exceeded"
    assert locked.request("GET", "/v1/models", key=keys["read"]).status == 200


def test_a_revoked_key_is_refused_within_a_moment(locked, home):
    file = KeyFile(home.keys)
    key, presented = file.add("leaver", "read")
    locked.wait_for(lambda: locked.request("GET", "/v1/models", key=presented).status == 200, 3)
    file.revoke(key.key_id)
    locked.wait_for(lambda: locked.request("GET", "/v1/models", key=presented).status == 401, 3)


def test_a_bucket_fills_at_its_rate_and_holds_no_more_than_its_burst(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    bucket = TokenBucket(rate_per_s=4, burst=2)
    assert [bucket.take() for _ in range(3)] == [0, 0, 1 / 4]
    now_s = 1 / 4
    assert [bucket.take() for _ in range(2)] == [0, 1 / 4]
    now_s = 100.0
    assert [bucket.take() for _ in range(3)] == [0, 0, 1 / 4]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.0.1"])
def test_a_loopback_address_needs_no_keys(tmp_path, host):
    assert_reachable_by_keys_only(host, Home(tmp_path))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_address_that_others_reach_needs_keys(tmp_path, host):
    with pytest.raises(ConfigError, match="recloop keys add NAME"):
        assert_reachable_by_keys_only(host, Home(tmp_path))
    KeyFile(Home(tmp_path).keys).add("shop", "write")
    assert_reachable_by_keys_only(host, Home(tmp_path))
