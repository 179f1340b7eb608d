# SPDX-License-Identifier: Apache-2.0
"""Files of features and feature statistics, in the layouts of common evaluators."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .._choices import StatisticsLayout
from .._files import write_atomically
from ._array_file import ArrayFile

# Names of mean and covariance, in order of precedence.
_STATISTICS_KEYS = (("mu", "sigma"), ("fid/mu", "fid/sigma"))
_STYLEGAN_KEYS = ("raw_mean", "raw_cov", "num_items")
_FEATURE_KEYS = ("features", "feats", "reps", "all_features")

# Names of a layout's second pair of mean and covariance.
_SECOND_KEYS = {"adm": ("mu_s", "sigma_s"), "fd-loss": ("avg_mu", "avg_sigma")}
LAYOUTS: tuple[StatisticsLayout, ...] = get_args(StatisticsLayout)

# Tolerance for symmetry and non-negativity, relative to the largest entry: covariances may be stored in half precision.
_ROUNDING = 1e-3


def load_statistics(path: str | os.PathLike[str], *, keys: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Load mean and covariance of features from a file of a common layout.

    layout                     file     names
    pytorch-fid, clean-fid     .npz     mu, sigma
    EDM                        .npz     mu, sigma
    ADM (guided-diffusion)     .npz     mu, sigma; mu_s, sigma_s of spatial features
    FD-Loss                    .npz     mu, sigma; avg_mu, avg_sigma
    StyleGAN2-ADA, StyleGAN3   .pkl     raw_mean, raw_cov, num_items: sums; the covariance is divided by N, not N - 1
    EDM2                       .pkl     fid/mu, fid/sigma, and others: a dictionary of dictionaries
    torch-fidelity             .pt      mu, sigma, as it caches them
    a dictionary               .npy     mu, sigma

    The format is detected from the first bytes, not from the name. Files cannot execute code: of pickles, only plain
    containers, numpy arrays of numbers and tensors are loaded.

    Args:
        path: path of the file.
        keys: names of mean and covariance, for another pair than the first in the table; "a/b" is entry b of entry a.

    Returns:
        mean [d] and cov [d, d], float64 tensors on the CPU; cov is exactly symmetric.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, missing names, shapes that do not match, numbers that are not finite, or a covariance that
            is not symmetric.
    """
    name, path = "load_statistics", Path(path)
    with ArrayFile(name, path) as arrays:
        return read_statistics(name, path, arrays, keys)


def load_features(path: str | os.PathLike[str]) -> Tensor:
    """Load features [N, d] from .npy, .npz or .pt with one array or an array "features", "feats" or "reps", or from StyleGAN's .pkl.

    Returns:
        A tensor on the CPU, of the file's dtype. A .npy file is memory-mapped copy-on-write: pages are read when they are used,
        and writing to the tensor does not change the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without such an array.
    """
    name, path = "load_features", Path(path)
    with ArrayFile(name, path) as arrays:
        features = _features(name, path, arrays)
        if features is None:
            raise ValueError(f"{name}: {path} must hold features [N, d], got {arrays.describe()}.")
        return features


def load_moments(path: str | os.PathLike[str], *, keys: Sequence[str] | None = None) -> tuple[Tensor, Tensor] | Tensor:
    """Load (mean, cov) like `load_statistics`, or from a file without statistics features [N, d] like `load_features`.

    Raises:
        FileNotFoundError, ValueError: as these functions.
    """
    name, path = "load_moments", Path(path)
    with ArrayFile(name, path) as arrays:
        if keys is None and not _has_statistics(arrays):
            features = _features(name, path, arrays)
            if features is not None:
                return features
        return read_statistics(name, path, arrays, keys)


def save_statistics(
    path: str | os.PathLike[str],
    mean: Tensor | np.ndarray,  # [d]
    cov: Tensor | np.ndarray,  # [d, d]
    *,
    layout: StatisticsLayout = "pytorch-fid",
    second: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    count: int | None = None,
) -> None:
    """Write mean and covariance in an evaluator's layout, atomically: to a temporary file that is then renamed.

    Args:
        path: ends in .npz, for "stylegan" in .pkl; an existing file is replaced.
        mean, cov: written in float64.
        layout: "pytorch-fid" and "edm": mu, sigma. "adm" and "fd-loss": with a second pair, see `load_statistics`.
            "stylegan": sums; `cov` must be divided by N, not N - 1.
        second: mean and covariance of ADM's spatial or FD-Loss's averaged features; required by these two layouts.
        count: N, required by "stylegan".

    Raises:
        ValueError: arguments that do not match the layout, or invalid statistics; nothing is written.
        OSError: the file cannot be written.
    """
    name, path = "save_statistics", Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"{name}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    suffix = ".pkl" if layout == "stylegan" else ".npz"
    if path.suffix != suffix:
        raise ValueError(f"{name}: a file of layout {layout!r} must end in {suffix}, got {str(path)!r}.")
    if (second is not None) != (layout in _SECOND_KEYS):
        rule = (
            f"needs second=(mean, cov), written as {' and '.join(_SECOND_KEYS[layout])}" if layout in _SECOND_KEYS else "has no second pair"
        )
        raise ValueError(f"{name}: layout {layout!r} {rule}, got {'None' if second is None else 'one'}.")
    if (count is not None) != (layout == "stylegan") or (count is not None and count < 1):
        rule = "needs the positive number of samples as count" if layout == "stylegan" else "has no count"
        raise ValueError(f"{name}: layout {layout!r} {rule}, got {count!r}.")
    mean, cov = (t.cpu().numpy() for t in check_statistics(name, mean, cov, "mean", "cov"))
    if count is not None:
        content = {
            "capture_all": False,
            "capture_mean_cov": True,
            "max_items": None,
            "num_items": int(count),
            "num_features": len(mean),
            "all_features": [],
            "raw_mean": mean * count,
            "raw_cov": (cov + np.outer(mean, mean)) * count,
        }
        write_atomically(path, lambda file: pickle.dump(content, file))
        return
    arrays: dict[str, Any] = {"mu": mean, "sigma": cov}
    if second is not None:
        pair = check_statistics(name, *second, "second[0]", "second[1]")
        arrays.update(zip(_SECOND_KEYS[layout], (t.cpu().numpy() for t in pair), strict=True))
    write_atomically(path, lambda file: np.savez(file, **arrays))


def check_statistics(owner: str, mean: Any, cov: Any, mean_name: str, cov_name: str) -> tuple[Tensor, Tensor]:
    """Convert mean [d] and cov [d, d] to float64 and make cov exactly symmetric; raise ValueError unless they are valid."""
    mean, cov = (_as_float64(owner, n, t) for n, t in ((mean_name, mean), (cov_name, cov)))
    if mean.dim() != 1 or cov.shape != (len(mean), len(mean)) or len(mean) == 0:
        raise ValueError(
            f"{owner}: {mean_name} and {cov_name} must have shapes [d] and [d, d], got {list(mean.shape)} and {list(cov.shape)}."
        )
    for n, t in ((mean_name, mean), (cov_name, cov)):
        if not t.isfinite().all():
            raise ValueError(f"{owner}: {n} must be finite, got {int((~t.isfinite()).sum())} NaN or infinite of {t.numel()} numbers.")
    allowed = _ROUNDING * float(cov.abs().max())
    difference = float((cov - cov.T).abs().max())
    if difference > allowed:
        raise ValueError(f"{owner}: {cov_name} must be symmetric, got entries that differ by {difference:.3g} from their mirror images.")
    smallest = float(cov.diagonal().min())
    if smallest < -allowed:
        raise ValueError(f"{owner}: {cov_name} must have variances on its diagonal, got {smallest:.3g}.")
    return mean, (cov + cov.T) / 2


def _as_float64(owner: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = np.asarray(value)
        if value.dtype.kind not in "fiu":
            raise ValueError(f"{owner}: {name} must hold real numbers, got {value.dtype}.")
        value = torch.from_numpy(value.astype(np.float64))
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64)


def read_statistics(name: str, path: Path, arrays: ArrayFile, keys: Sequence[str] | None) -> tuple[Tensor, Tensor]:
    """Mean and covariance from an open file; see `load_statistics`."""
    if keys is not None:
        if isinstance(keys, str) or not isinstance(keys, Sequence) or len(keys) != 2:
            raise ValueError(f"{name}: keys must be the two names of mean and covariance, got {keys!r}.")
        candidates = [tuple(keys)]
    else:
        candidates = _STATISTICS_KEYS
    for pair in candidates:
        if arrays.has(*pair):
            return check_statistics(f"{name}: {path}", arrays[pair[0]], arrays[pair[1]], *pair)
    if keys is None and arrays.has(*_STYLEGAN_KEYS):
        return _from_sums(name, path, *(arrays[key] for key in _STYLEGAN_KEYS))
    wanted = " and ".join(repr(key) for key in (keys or _STATISTICS_KEYS[0]))
    raise ValueError(f"{name}: {path} must hold {wanted}, got {arrays.describe()}.")


def _has_statistics(arrays: ArrayFile) -> bool:
    if any(arrays.has(*pair) for pair in _STATISTICS_KEYS):
        return True
    # A StyleGAN file of features only has sums as well, all zero.
    return arrays.has(*_STYLEGAN_KEYS) and bool(np.all(arrays["capture_mean_cov"] if arrays.has("capture_mean_cov") else True))


def _from_sums(name: str, path: Path, raw_mean: Any, raw_cov: Any, num_items: Any) -> tuple[Tensor, Tensor]:
    count = int(num_items)
    if count < 1:
        raise ValueError(f"{name}: {path} must hold statistics of at least one sample, got num_items={count}.")
    # In extended precision where the platform has it, since the difference of two large numbers cancels.
    mean = np.asarray(raw_mean, np.longdouble) / count
    cov = np.asarray(raw_cov, np.longdouble) / count - np.multiply.outer(mean, mean)
    return check_statistics(f"{name}: {path}", mean, cov, "raw_mean", "raw_cov")


def _features(name: str, path: Path, arrays: ArrayFile) -> Tensor | None:
    """The features in a file, or None if no array can be identified as features."""
    key = next((key for key in _FEATURE_KEYS if arrays.has(key)), arrays.names[0] if len(arrays.names) == 1 else None)
    if key is None:
        return None
    array = arrays[key]
    if isinstance(array, list):  # batches, in StyleGAN files
        array = np.concatenate(array) if array else np.zeros((0, 0), np.float32)
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise ValueError(f"{name}: {path} must hold features, floats [N, d], got {array.dtype} {list(array.shape)} as {key!r}.")
    if array.dtype.itemsize > 8 or not array.dtype.isnative:  # unsupported by torch
        array = array.astype(f"=f{min(8, array.dtype.itemsize)}")
    return torch.from_numpy(array)
