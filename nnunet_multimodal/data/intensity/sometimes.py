"""Apply a transform to some of the samples only."""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform


class Sometimes(BasicTransform):
    """Applies ``transform`` with probability ``p``, decided by numpy.

    batchgeneratorsv2's RandomTransform asks torch.rand, and nnU-Net re-seeds only numpy in its workers: there every
    worker would decide alike. All draws happen in ``get_parameters``, those of the inner transform too.
    """

    def __init__(self, transform: BasicTransform, p: float) -> None:
        super().__init__()
        self.transform = transform
        self.p = p

    def get_parameters(self, **data_dict: Any) -> dict:
        drawn = np.random.uniform() < self.p
        return {"inner": self.transform.get_parameters(**data_dict) if drawn else None}

    def apply(self, data_dict: dict, **params: Any) -> dict:
        if params["inner"] is None:
            return data_dict
        return self.transform.apply(data_dict, **params["inner"])
