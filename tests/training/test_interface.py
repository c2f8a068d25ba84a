"""The interface that gloo is told to use."""

import os

import psutil
import pytest

from training.interface import VARIABLE, interface_of, name_interface


def test_every_address_of_the_machine_has_its_interface() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family.name == "AF_INET":
                assert interface_of(one.address) == name
    assert interface_of("203.0.113.77") is None  # a documentation address, nobody's


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "chosen0")
    name_interface()
    assert os.environ[VARIABLE] == "chosen0"
