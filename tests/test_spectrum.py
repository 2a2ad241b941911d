"""What the planner ranks frames by: expected variances stand where the coefficients stand."""

from __future__ import annotations

import numpy as np
import pytest

import polarpack as pp


@pytest.mark.parametrize(
    "settings",
    [{}, {"n_components": 9}, {"n_classes": 3}, {"n_classes": 3, "n_leading": 12}],
    ids=str,
)
def test_expected_variances_are_those_of_the_training_rows(settings):
    """In a frame fitted on these rows, what is expected of a coefficient is what it has: also in
    the order in which coefficients go through a trellis. (Roughly: small classes lean on all rows.)"""
    pytest.importorskip("faiss")  # classes start from k-means
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6000, 24)) * np.geomspace(20, 0.05, 24)
    x += 60 * rng.standard_normal((3, 24))[rng.integers(3, size=len(x))]
    q = pp.PolarQuantizer(fine="trellis", rotation="klt", radius_bits=0, bits=2.0, **settings)
    x = x.astype(np.float32)
    q.fit_frame(x)
    seen = q.spectrum(x)
    ratio = seen.variances / seen.expected
    assert ratio.min() > 1 / 40
    assert ratio.max() < 40
