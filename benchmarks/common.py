"""What all benchmarks share: where results go and what is written down with them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("nnunet-multimodal", "nnunetv2", "torch", "numpy", "batchgeneratorsv2", "dynamic-network-architectures")


def write_result(name: str, measured: dict[str, Any], note: str) -> Path:
    """benchmarks/results/NAME.json: the numbers, how they were made, on what, and when."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}"
    content = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "note": note,
        "measured": measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
