import socket

import pytest

from serving import shared_port


@pytest.fixture
def pair():
    first = shared_port.listen("127.0.0.1", 0)
    second = shared_port.listen("127.0.0.1", first.getsockname()[1])
    yield first, second
    first.close()
    second.close()


def connect_and_count(listeners, connections=20):
    """Return how many of so many new connections each listener got."""
    address = next(listener for listener in listeners if listener.fileno() >= 0).getsockname()
    clients = [socket.create_connection(address) for _ in range(connections)]
    counts = []
    for listener in listeners:
        counts.append(0)
        while listener.fileno() >= 0:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                break
            counts[-1] += 1
    for client in clients:
        client.close()
    return counts


def test_the_first_listener_gets_every_connection_until_another_is_chosen(pair):
    first, _ = pair
    assert connect_and_count(pair) == [20, 0]
    shared_port.choose(first, 1)
    assert connect_and_count(pair) == [0, 20]


def test_who_is_left_gets_every_connection(pair):
    first, _ = pair
    shared_port.choose(first, 1)
    first.close()
    assert connect_and_count(pair) == [0, 20]


def test_a_port_that_somebody_does_not_share_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            shared_port.listen("127.0.0.1", other.getsockname()[1])
