"""Files of feature statistics and of features, in the layouts that evaluators write."""

import io
import os
import pickle
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Names of mean and covariance, in the order in which they are looked for.
_STATISTICS_KEYS = (("mu", "sigma"), ("fid/mu", "fid/sigma"))
_STYLEGAN_KEYS = ("raw_mean", "raw_cov", "num_items")
_FEATURE_KEYS = ("features", "feats", "all_features")

# Second pair of mean and covariance that a layout holds.
_SECOND_KEYS = {"adm": ("mu_s", "sigma_s"), "fd-loss": ("avg_mu", "avg_sigma")}
LAYOUTS = ("pytorch-fid", "edm", "adm", "fd-loss", "stylegan")

# A covariance that was stored in half or single precision is symmetric and non-negative up to this much of its largest entry.
_ROUNDING = 1e-3


def load_statistics(path: str | os.PathLike, *, keys: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of features from a file of any common layout.

    layout                     file     names
    pytorch-fid, clean-fid     .npz     mu, sigma
    EDM                        .npz     mu, sigma
    ADM (guided-diffusion)     .npz     mu, sigma; mu_s, sigma_s of spatial features
    FD-Loss                    .npz     mu, sigma; avg_mu, avg_sigma
    StyleGAN2-ADA, StyleGAN3   .pkl     raw_mean, raw_cov, num_items: sums, of which the covariance is divided by N, not N - 1
    EDM2                       .pkl     fid/mu, fid/sigma and the like: a dictionary of dictionaries

    What a file is shows in its first bytes, not in its name. Nothing in a file is executed: of pickles, which could
    hold any program, only plain containers and numpy arrays of numbers are read.

    Args:
        path: of the file.
        keys: names of mean and covariance, for another pair than the first of the table; "a/b" is entry b of entry a.

    Returns:
        mean [d] and cov [d, d], float64 tensors on the CPU; cov exactly symmetric.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, names missing, shapes that do not fit, numbers that are not finite, or a matrix that is not symmetric.
    """
    name, path = "load_statistics", Path(path)
    with ArrayFile(name, path) as arrays:
        return read_statistics(name, path, arrays, keys)


def load_features(path: str | os.PathLike) -> Tensor:
    """Features [N, d] from a .npy file, from an .npz file with one array or one named "features" or "feats", or StyleGAN's .pkl.

    Returns:
        a tensor on the CPU, of the dtype in the file. A .npy file is mapped, not read: its pages are loaded as they are used,
        and writing to the tensor does not write to the file.

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


def load_moments(path: str | os.PathLike, *, keys: Sequence[str] | None = None) -> tuple[Tensor, Tensor] | Tensor:
    """What a file holds: (mean, cov) as from `load_statistics`, or else features [N, d] as from `load_features`.

    Raises:
        FileNotFoundError, ValueError: as they do.
    """
    name, path = "load_moments", Path(path)
    with ArrayFile(name, path) as arrays:
        if keys is None and not _has_statistics(arrays):
            features = _features(name, path, arrays)
            if features is not None:
                return features
        return read_statistics(name, path, arrays, keys)


def save_statistics(
    path: str | os.PathLike,
    mean: Tensor | np.ndarray,  # [d]
    cov: Tensor | np.ndarray,  # [d, d]
    *,
    layout: str = "pytorch-fid",
    second: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    count: int | None = None,
) -> None:
    """Write mean and covariance in an evaluator's layout.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        path: ending in .npz, for "stylegan" in .pkl; a file that is there is replaced.
        mean, cov: written in float64.
        layout: "pytorch-fid" and "edm": mu, sigma. "adm" and "fd-loss": with a second pair, see `load_statistics`.
            "stylegan": sums, with N in the place of N - 1; `cov` must have been divided by N.
        second: mean and covariance of ADM's spatial features or FD-Loss's averaged ones; which those two layouts need.
        count: N, which "stylegan" needs.

    Raises:
        ValueError: as a sentence, before anything is written.
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
    if layout == "stylegan":
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
    arrays = {"mu": mean, "sigma": cov}
    if second is not None:
        pair = check_statistics(name, *second, "second[0]", "second[1]")
        arrays.update(zip(_SECOND_KEYS[layout], (t.cpu().numpy() for t in pair), strict=True))
    write_atomically(path, lambda file: np.savez(file, **arrays))


def check_statistics(owner: str, mean: Any, cov: Any, mean_name: str, cov_name: str) -> tuple[Tensor, Tensor]:
    """mean [d] and cov [d, d] in float64, cov made exactly symmetric; a sentence for what is no mean and covariance."""
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


def write_atomically(path: Path, write: Any) -> None:
    """Have `write(file)` fill a file beside `path`, then move it there; what fails leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_float64(owner: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = np.asarray(value)
        if value.dtype.kind not in "fiu":
            raise ValueError(f"{owner}: {name} must hold real numbers, got {value.dtype}.")
        value = torch.from_numpy(value.astype(np.float64))
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64)


def read_statistics(name: str, path: Path, arrays: "ArrayFile", keys: Sequence[str] | None) -> tuple[Tensor, Tensor]:
    if keys is not None:
        if isinstance(keys, str) or len(keys) != 2:
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


def _has_statistics(arrays: "ArrayFile") -> bool:
    if any(arrays.has(*pair) for pair in _STATISTICS_KEYS):
        return True
    # StyleGAN's file of features alone has sums too, all zero.
    return arrays.has(*_STYLEGAN_KEYS) and bool(np.all(arrays["capture_mean_cov"] if arrays.has("capture_mean_cov") else True))


def _from_sums(name: str, path: Path, raw_mean: Any, raw_cov: Any, num_items: Any) -> tuple[Tensor, Tensor]:
    count = int(num_items)
    if count < 1:
        raise ValueError(f"{name}: {path} must hold statistics of at least one sample, got num_items={count}.")
    # In extended precision, where there is one, for the difference of two large numbers.
    mean = np.asarray(raw_mean, np.longdouble) / count
    cov = np.asarray(raw_cov, np.longdouble) / count - np.multiply.outer(mean, mean)
    return check_statistics(f"{name}: {path}", mean, cov, "raw_mean", "raw_cov")


def _features(name: str, path: Path, arrays: "ArrayFile") -> Tensor | None:
    """The features in a file, or None where it has no array for them."""
    key = next((key for key in _FEATURE_KEYS if arrays.has(key)), arrays.names[0] if len(arrays.names) == 1 else None)
    if key is None:
        return None
    array = arrays[key]
    if isinstance(array, list):  # StyleGAN keeps batches
        array = np.concatenate(array) if array else np.zeros((0, 0), np.float32)
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise ValueError(f"{name}: {path} must hold features, floats [N, d], got {array.dtype} {list(array.shape)} as {key!r}.")
    if array.dtype.itemsize > 8 or not array.dtype.isnative:  # which torch has not
        array = array.astype(f"=f{min(8, array.dtype.itemsize)}")
    return torch.from_numpy(array)


class ArrayFile:
    """The named arrays of a .npz, .npy or .pkl file; an .npz is read one array at a time, as they are asked for."""

    def __init__(self, owner: str, path: Path) -> None:
        self.owner, self.path = owner, path
        if not path.exists():
            raise FileNotFoundError(f"{owner}: there is no file {path}.")
        try:
            self.content = self._open()
        except _FILE_ERRORS as error:
            raise self._unreadable(error) from error
        self.names = list(_leaves(self.content))

    def _open(self) -> Mapping[str, Any]:
        with open(self.path, "rb") as file:
            start = file.read(6)
            if start.startswith(b"PK"):
                return np.load(self.path, allow_pickle=False)
            if start == b"\x93NUMPY":
                # Copy on write: torch warns of arrays that it must not write to.
                return {"array": np.load(self.path, mmap_mode="c", allow_pickle=False)}
            file.seek(0)
            content = _PlainUnpickler(file).load()
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds a {type(content).__name__} where a dictionary is wanted")
        return content

    def has(self, *keys: str) -> bool:
        return all(key in self.names for key in keys)

    def __getitem__(self, key: str) -> Any:
        value = self.content
        try:
            for part in [key] if key in value else key.split("/"):
                value = value[part]
        except _FILE_ERRORS as error:
            raise self._unreadable(error) from error
        return value

    def describe(self) -> str:
        return f"the names {', '.join(sorted(self.names))}" if self.names else "nothing"

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.owner}: {self.path} must be an .npz, .npy or .pkl file of arrays, got one that cannot be read: {error}.")

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.content, np.lib.npyio.NpzFile):
            self.content.close()


_FILE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    ImportError,
    UnicodeDecodeError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)


def _leaves(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the entries of a dictionary of dictionaries."""
    if isinstance(content, np.lib.npyio.NpzFile):
        return list(content.files)
    names = []
    for key, value in content.items():
        names += _leaves(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return names


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays of numbers; a pickle that names anything else is refused.

    Nothing that a pickle names is called: stand-ins take its arguments. numpy's own dtypes and arrays can be restored to a state in
    which the bytes of the file are taken for pointers to objects.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file, encoding="latin1")
        # Bound methods, as a pickle could set the defaults of a function.
        self._stand_ins = {
            "numpy.ndarray": None,  # named as what _reconstruct makes
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": self._empty,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._array,
            "_codecs.encode": self._bytes,
        }

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if known not in self._stand_ins:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, and only arrays in plain containers are read")
        return self._stand_ins[known]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("the pickle refers to objects outside of it")

    def _empty(self, cls: None, shape: tuple, typecode: bytes) -> np.ndarray:
        return _Array(0)

    def _scalar(self, dtype: "_Dtype", data: bytes | str) -> np.generic:
        return _numbers(data, dtype, (), "C")[()]

    def _array(self, data: bytes, dtype: "_Dtype", shape: tuple[int, ...], order: str) -> np.ndarray:
        return _numbers(data, dtype, shape, order)

    def _bytes(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")


class _Dtype:
    """A numpy.dtype of numbers, of which a pickle sets the byte order and nothing else."""

    def __init__(self, name: Any, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"the pickle holds an array of {self.dtype}, and only numbers are read")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that is filled after it was made, with what has been checked."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        array = _numbers(data, dtype, shape, "F" if is_fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, False, array.tobytes()))


def _numbers(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Of a copy of the data, which may belong to an array that the pickle fills anew; Python 2 wrote bytes as strings."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(bytearray(data), dtype.dtype).reshape(shape, order=order)
