"""The benchmarks are scripts of the checkout, not part of what is installed: their tests find them from its root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
