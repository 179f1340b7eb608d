# SPDX-License-Identifier: Apache-2.0
"""FrechetInceptionDistance of torchmetrics, implemented with genperf.frechet_distance; torchmetrics must be installed.

    from genperf.compat.torchmetrics import FrechetInceptionDistance

The arguments, update, reset, sync and plot are those of upstream, and so are the names, dtypes and reductions of the states:
checkpoints load in both directions, and ranks with either class can be synchronized. Values agree to 1e-6 relative
where upstream is accurate.

Differences from upstream:
  - Fewer samples than features: upstream takes roots of eigenvalues that are rounding errors. Here the rank of a covariance of
    n samples is limited to n - 1.
  - The distance is never negative.
  - Mean, covariance and root are float64 (float32 on MPS) for any dtype of the states.
  - Half-precision features give a float32 distance; upstream rounds it to half precision, where 65520 overflows.
  - compute() after loaded or merged states works without an update; upstream raises AttributeError.

As upstream, the states are sums of features and of their products, which cancel if the mean is large compared with the standard
deviation: a ratio of r costs 2 log10(r) of the 16 digits of float64, or of the 7 digits of float32 states.
genperf.metrics.FrechetDistance has no such loss.

To use the matrix root only, in torchmetrics' own class, replace its helper:

    torchmetrics.image.fid._compute_fid = genperf.frechet_distance
"""

import torch
from torch import Tensor

try:
    from torchmetrics.image import fid
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "genperf.compat.torchmetrics: this module extends a class of torchmetrics, which is not installed; pip install torchmetrics.",
        name=error.name,
    ) from error

from ._feature_sums import distance_of_sums


class FrechetInceptionDistance(fid.FrechetInceptionDistance):
    """Frechet distance between the features of real and generated images, with the interface of torchmetrics.

    The arguments are those of torchmetrics.image.fid.FrechetInceptionDistance; `feature` is 64, 192, 768 or 2048, a layer of
    torch-fidelity's InceptionV3, or a module that returns features [N, d].
    """

    def compute(self) -> Tensor:
        """Distance between all real and all generated images since the last reset.

        Returns:
            A scalar of the features' dtype, at least float32.

        Raises:
            RuntimeError: fewer than two real or two generated images.
        """
        counts = int(self.real_features_num_samples), int(self.fake_features_num_samples)
        if min(counts) < 2:
            raise RuntimeError(
                f"FrechetInceptionDistance: there must be at least two real and two generated images, got {counts[0]} and {counts[1]}."
            )
        real = self.real_features_sum, self.real_features_cov_sum, counts[0]
        fake = self.fake_features_sum, self.fake_features_cov_sum, counts[1]
        distance = distance_of_sums(real, fake)
        return distance.to(torch.promote_types(getattr(self, "orig_dtype", torch.float32), torch.float32))
