"""The audit of what is installed finds each kind of fault."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit.py"


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", AUDIT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PINS = "# tested together\nalpha==1.2\nBeta_b==2.0\n"


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"alpha": ("1.2", []), "beta-b": ("2.0+cpu", ["alpha>=1"])}, []),
        ({"alpha": ("1.3", [])}, ["alpha 1.3: constraints.txt has 1.2"]),
        ({"gamma": ("0.1", [])}, ["gamma 0.1: is pinned nowhere"]),
        ({"alpha": ("1.2", ["beta-b"])}, ["alpha 1.2: asks for beta-b, which is not installed"]),
        ({"alpha": ("1.2", ["beta-b<2"]), "beta-b": ("2.0", [])}, ["alpha 1.2: asks for beta-b<2, and 2.0"]),
        ({"alpha": ("1.2", ['gamma; extra == "more"', 'gamma; python_version < "3"'])}, []),
        ({"torchrec": ("1.8.0", ["fbgemm-gpu"])}, ["torchrec 1.8.0: is pinned nowhere"]),
        ({"recloop": ("0.1.0", ["anything"])}, []),
    ],
)
def test_faults_are_named(audit, installed, said):
    faults = audit.find_faults(PINS, installed)
    assert len(faults) == len(said)
    assert all(fault.startswith(start) for fault, start in zip(faults, said, strict=True))


def test_what_is_installed_here_is_what_is_pinned():
    # A process of its own: libraries that tests import put folders of their own on this one's path.
    ended = subprocess.run([sys.executable, AUDIT], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "")
