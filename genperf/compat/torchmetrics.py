"""torchmetrics' FrechetInceptionDistance over genperf.frechet_distance; needs torchmetrics.

    from genperf.compat.torchmetrics import FrechetInceptionDistance

What is the same: the arguments, update, reset, sync and plot; the states, by name, dtype and reduction, so that checkpoints
and processes of the two classes understand each other; the value, to 1e-6 relative where theirs is accurate.

What differs, since there it is a fault:
  - Fewer samples than features: theirs takes the roots of eigenvalues that are rounding errors. Here a covariance of n
    samples has rank n - 1 at most, and what the sums hold beyond that is left out.
  - The distance is never below 0.
  - Mean, covariance and root are float64 (float32 on MPS) whatever `set_dtype` has made of the states.
  - Half-precision features give a float32 distance; theirs is rounded to half precision, infinite from 65520 on.
  - compute() after loaded or merged states works without an update; theirs raises AttributeError.

What stays: the states are plain sums, of features and of their products, which cancel where the mean is large beside the
standard deviation. A ratio of r costs 2 log10(r) of the about 16 digits of float64: nothing to speak of below 10^4, and
float32 features themselves are used up at 10^7. States in float32 have 7 digits. genperf.metrics.FrechetDistance has no
such loss.

For the root alone, in torchmetrics' own class, put genperf.frechet_distance in the place of its helper:

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

from ..ops.covariance_factor import working_dtype
from ..ops.frechet_distance import frechet_distance


class FrechetInceptionDistance(fid.FrechetInceptionDistance):
    """Frechet distance between the features of real and generated images, under torchmetrics' name and interface.

    Takes the arguments of torchmetrics.image.fid.FrechetInceptionDistance; `feature` is one of 64, 192, 768, 2048, the layers of
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
        mean1, cov1, factor1 = _moments(self.real_features_sum, self.real_features_cov_sum, counts[0])
        mean2, cov2, factor2 = _moments(self.fake_features_sum, self.fake_features_cov_sum, counts[1])
        distance = frechet_distance(mean1, cov1, mean2, cov2, factor1=factor1, factor2=factor2)
        return distance.to(torch.promote_types(getattr(self, "orig_dtype", torch.float32), torch.float32))


def _moments(total: Tensor, outer: Tensor, count: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean, and covariance or factor, of `count` samples with the sum `total` and the sum of products `outer`."""
    dtype = working_dtype(total.device)
    mean = total.to(dtype) / count
    cov = (outer.to(dtype) - count * torch.outer(mean, mean)) / (count - 1)
    rank = count - 1
    if rank >= mean.shape[0] or not cov.isfinite().all():
        return mean, cov, None
    values, vectors = torch.linalg.eigh(cov)
    return mean, None, vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
