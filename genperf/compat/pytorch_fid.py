# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance of pytorch-fid, implemented with genperf.frechet_distance.

Neither pytorch-fid nor scipy need be installed. To use it in pytorch-fid:

    pytorch_fid.fid_score.calculate_frechet_distance = genperf.compat.pytorch_fid.calculate_frechet_distance

Other evaluators have a copy of this function, under this name or as `frechet_distance` (clean-fid: cleanfid.fid), which can be
replaced in the same way.

The arguments, the result (a numpy float64) and the AssertionError for different shapes are those of upstream. Values agree to
1e-6 relative where upstream is accurate.

Differences from upstream:
  - scipy is not used: from scipy 1.18 on, sqrtm has no argument `disp`, and every call of upstream raises TypeError; versions
    1.11.2 to 1.12 could return arbitrarily wrong roots; from 1.16 on, sqrtm fails for d = 1.
  - Singular covariances, such as those of fewer samples than features, are supported. Upstream raises ValueError
    ("Imaginary component"), or adds `eps` to the diagonals in the root but not in the traces.
  - The distance is never negative, and that of equal statistics is 0 up to rounding.
  - A mean and a covariance of different dimensions raise AssertionError; upstream returns a number. So do numbers in place of
    arrays, which are the statistics of a flattened array of features; those of one feature have the shapes [1] and [1, 1].
  - float32 statistics are converted to float64.
  - It takes 0.7 s instead of 17 s at d = 2048 on two CPU cores (benchmarks/results).
"""

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..ops.frechet_distance import frechet_distance


def calculate_frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike, eps: float = 1e-6) -> np.float64:
    """Frechet distance between Gaussians, from means and covariances; Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017).

    Equivalent to:
        product = scipy.linalg.sqrtm(sigma1 @ sigma2)
        distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * product.real)

    Args:
        mu1, mu2: [d] arrays.
        sigma1, sigma2: [d, d] arrays, symmetric positive semi-definite.
        eps: accepted for compatibility, not used.

    Returns:
        A numpy float64, computed in float64 on the CPU.

    Raises:
        AssertionError: shapes that do not match, as in pytorch-fid.
        ValueError: a NaN or an infinity.
    """
    op = "calculate_frechet_distance"
    mu1, sigma1, mu2, sigma2 = (np.asarray(given, dtype=np.float64) for given in (mu1, sigma1, mu2, sigma2))
    # Raised instead of asserted, since python -O removes assertions.
    if mu1.shape != mu2.shape:
        raise AssertionError(f"{op}: the means must have one shape, got {mu1.shape} and {mu2.shape}.")
    if sigma1.shape != sigma2.shape:
        raise AssertionError(f"{op}: the covariances must have one shape, got {sigma1.shape} and {sigma2.shape}.")
    if mu1.ndim != 1 or sigma1.shape != mu1.shape * 2:
        flat = " Were the features flattened? They must be [N, d]." if min(mu1.ndim, sigma1.ndim - 1) < 1 else ""
        raise AssertionError(f"{op}: the means must have shape [d] and the covariances [d, d], got {mu1.shape} and {sigma1.shape}.{flat}")
    for name, array in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(array).all():
            raise ValueError(f"{op}: {name} must be finite, got a NaN or an infinity.")
    mean1, cov1, mean2, cov2 = (torch.tensor(np.ascontiguousarray(array)) for array in (mu1, sigma1, mu2, sigma2))
    with torch.no_grad():
        return np.float64(frechet_distance(mean1, cov1, mean2, cov2).item())
