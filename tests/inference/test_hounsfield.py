"""Hounsfield units give CT away."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_multimodal.inference.hounsfield import likelihood, share_of_air


@pytest.mark.parametrize(
    ("network", "air", "posterior"),
    [
        (0.005, 0.12, 0.005 * 0.95 / (0.005 * 0.95 + 0.995 * 0.001)),  # the network is sure of MR, the air is surer
        (0.554, 0.0, 0.554 * 0.05 / (0.554 * 0.05 + 0.446 * 0.999)),  # undecided, and no air
        (0.998, 0.0, 0.998 * 0.05 / (0.998 * 0.05 + 0.002 * 0.999)),  # CT cut to the inside of the body
    ],
)
def test_weighs_what_the_network_says(network: float, air: float, posterior: float) -> None:
    ct, mr = likelihood(("CT", "MR"), air)
    assert network * ct / (network * ct + (1 - network) * mr) == pytest.approx(posterior)
    assert (posterior > 0.5) == (network not in (0.554,))


def test_says_nothing_where_there_is_no_ct() -> None:
    assert likelihood(("T1w", "T2w"), 0.5) == [1.0, 1.0]


def test_counts_air() -> None:
    image = np.zeros((2, 5, 10), np.float32)
    image[0, 0, :7] = -1000
    assert share_of_air(image) == pytest.approx(0.07)
