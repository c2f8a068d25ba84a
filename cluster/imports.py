"""Load what a higher layer offers, by name: the floor imports nothing of ours, and starts it by import string.

In:  `module:name`.  Out: the object.
Knows nothing of what it loads.
"""

import importlib
from typing import Any


def load_target(target: str) -> Any:  # noqa: ANN401  (a function or class of a higher layer)
    """Import the module of `module:name` and return its attribute `name`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
