# SPDX-License-Identifier: Apache-2.0
"""Precomputed reference statistics for Frechet distances."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._choices import Impl
from ..ops.covariance_factor import working_dtype
from ._features import feature_matrix, finite_features
from ._sample_moments import centered_factor, sample_moments
from .feature_moments import FeatureMoments
from .statistics_files import ArrayFile, check_statistics, read_statistics, write_atomically


class FrechetReference:
    """Mean and covariance of reference features, with a factor of the covariance computed once for many distances.

    Instances are immutable. Create them with `from_moments`, `from_features` or `load`:

        reference = FrechetReference.load("imagenet-256.npz")
        distance = reference.distance_to_features(features)

    Args:
        mean: [d], float64 or float32.
        cov: [d, d], of mean's dtype; None computes it from the factor when it is first read.
        factor: [d, r], of mean's dtype, with cov = factor @ factor.T, which is not checked.

    Attributes:
        mean, cov, factor: the tensors.
        dim: d.
        device, dtype: device and dtype of the tensors.

    Raises:
        ValueError: shapes that do not match, or tensors on different devices.
        TypeError: tensors of different or of other dtypes.
    """

    def __init__(self, mean: Tensor, cov: Tensor | None, factor: Tensor) -> None:
        name = "FrechetReference"
        given = {"mean": mean, "factor": factor} | ({} if cov is None else {"cov": cov})
        for key, value in given.items():
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64) or value.dtype != mean.dtype:
                kinds = ", ".join(f"{k} {v.dtype if isinstance(v, Tensor) else type(v).__name__}" for k, v in given.items())
                raise TypeError(f"{name}: {key} must be a tensor of float64, or float32, as the others are, got {kinds}.")
        d = mean.numel()
        if mean.dim() != 1 or factor.dim() != 2 or len(factor) != d or (cov is not None and cov.shape != (d, d)):
            shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in given.items())
            raise ValueError(f"{name}: shapes must be [d], [d, d] and [d, r], got {shapes}.")
        if len({t.device for t in given.values()}) > 1:
            places = ", ".join(f"{k} {v.device}" for k, v in given.items())
            raise ValueError(f"{name}: mean, covariance and factor must be on one device, got {places}.")
        self.mean = mean.detach()
        self.factor = factor.detach()
        self._cov = None if cov is None else cov.detach()

    @classmethod
    def from_moments(cls, mean: Tensor | np.ndarray, cov: Tensor | np.ndarray) -> "FrechetReference":
        """Create a reference from mean [d] and covariance [d, d], in float64; the covariance may be singular.

        Raises:
            ValueError: shapes that do not match, NaN or infinity, a matrix that is not symmetric or has negative variances.
        """
        mean, cov = check_statistics("FrechetReference.from_moments", mean, cov, "mean", "cov")
        return cls(mean, cov, ops.covariance_factor(cov))

    @classmethod
    def from_features(cls, features: Tensor, *, unbiased: bool = True) -> "FrechetReference":
        """Create a reference from features [N, d], or [B, d, H, W], which are averaged over positions.

        With N <= d, the factor [d, N - 1] is computed from the centered features, without a d x d matrix.

        Raises:
            ValueError: as `FeatureMoments`, or too few samples.
            TypeError: not a floating-point tensor.
        """
        rows = finite_features("FrechetReference.from_features", features, None)
        if len(rows) <= rows.shape[1]:
            mean, factor = centered_factor("FrechetReference.from_features", rows.to(working_dtype(rows.device)), unbiased)
            return cls(mean, None, factor)
        moments = FeatureMoments(unbiased=unbiased).update(rows)
        return cls.from_moments(moments.mean, moments.cov)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, keys: tuple[str, str] | None = None) -> "FrechetReference":
        """Load a file written by `save`, or any statistics file that `load_statistics` reads.

        Args:
            path: path of the file.
            keys: as in `load_statistics`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file without statistics, or with a factor that does not match its covariance.
        """
        name, path = "FrechetReference.load", Path(path)
        with ArrayFile(name, path) as arrays:
            mean, cov = read_statistics(name, path, arrays, keys)
            if keys is not None or not arrays.has("factor"):
                return cls(mean, cov, ops.covariance_factor(cov))
            factor = torch.from_numpy(np.asarray(arrays["factor"], np.float64))
        if factor.dim() != 2 or len(factor) != len(mean) or not _is_factor(factor, cov):
            raise ValueError(f"{name}: {path} must hold a factor [d, r] of its sigma, got another matrix {list(factor.shape)}.")
        return cls(mean, cov, factor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write mu, sigma and factor to an .npz file, atomically and in float64; pytorch-fid reads it too.

        Raises:
            ValueError: a path that does not end in .npz.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"FrechetReference.save: the file must end in .npz, got {str(path)!r}.")
        mu, sigma, factor = (t.cpu().to(torch.float64).numpy() for t in (self.mean, self.cov, self.factor))
        write_atomically(path, lambda file: np.savez(file, mu=mu, sigma=sigma, factor=factor))

    @property
    def cov(self) -> Tensor:
        if self._cov is None:
            self._cov = self.factor @ self.factor.T
        return self._cov

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FrechetReference":
        """The reference on another device, in float64 or float32; always float32 on MPS, which has no float64."""
        device = self.device if device is None else torch.device(device)
        dtype = torch.float32 if device.type == "mps" else dtype or self.dtype
        # The dtype first, since the target device may lack the current one.
        mean, factor = (t.to(dtype).to(device) for t in (self.mean, self.factor))
        return FrechetReference(mean, None if self._cov is None else self._cov.to(dtype).to(device), factor)

    def distance(self, mean: Tensor, cov: Tensor, *, impl: Impl | None = None) -> Tensor:
        """The Frechet distance to a mean [d] and covariance [d, d], differentiable in both; see `genperf.frechet_distance`.

        Raises:
            ValueError, TypeError, NotImplementedError: as `genperf.frechet_distance`.
        """
        mean, cov = (t.to(self.dtype) if isinstance(t, Tensor) else t for t in (mean, cov))
        return ops.frechet_distance(self.mean, None, mean, cov, factor1=self.factor, impl=impl)

    def distance_to_features(self, features: Tensor, *, unbiased: bool = True, impl: Impl | None = None) -> Tensor:
        """The Frechet distance to the mean and covariance of features, differentiable in them.

        Equivalent to:
            x = features.double()                                                    # [N, d]
            genperf.frechet_distance(reference.mean, reference.cov, x.mean(0), torch.cov(x.T, correction=1 if unbiased else 0))

        With N below about d, the centered features serve as a factor, and no d x d matrix is computed for them.

        Args:
            features: [N, d], or [B, d, H, W], which are averaged over positions; any floating dtype. Computed in the
                dtype of the reference. NaN and infinity give NaN.
            unbiased: whether to divide the covariance by N - 1; False divides by N.
            impl: as in `genperf.frechet_distance`.

        Returns:
            A scalar of the reference's dtype, differentiable once; gradients are finite for singular covariances too.

        Raises:
            ValueError: another shape, dimension or device, or fewer than two samples (one if not unbiased).
            TypeError: not a floating-point tensor.
        """
        name = "FrechetReference.distance_to_features"
        rows = feature_matrix(name, features, self.dim, self.dtype)
        if features.device != self.device:
            raise ValueError(f"{name}: features and reference must be on one device, got {features.device} and {self.device}.")
        mean, cov, factor = sample_moments(name, rows.to(self.dtype), unbiased)
        return ops.frechet_distance(self.mean, None, mean, cov, factor1=self.factor, factor2=factor, impl=impl)

    def __repr__(self) -> str:
        return f"FrechetReference(dim={self.dim}, rank={self.factor.shape[1]}, dtype={self.dtype}, device={self.device})"


def _is_factor(factor: Tensor, cov: Tensor) -> bool:
    """Whether cov = factor @ factor.T, tested on one random vector."""
    probe = torch.randn(len(cov), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = factor @ (factor.T @ probe) - cov @ probe
    return bool(difference.norm() <= 1e-6 * torch.linalg.matrix_norm(cov) * probe.norm())
