"""The benchmarks are scripts beside the package; their tests import them, and the trainers' tiny training."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS.parent / "benchmarks", TESTS / "trainers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
