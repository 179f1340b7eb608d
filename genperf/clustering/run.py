# SPDX-License-Identifier: Apache-2.0
"""Residual k-means of the vectors of a file, stage by stage, with what it writes."""

import dataclasses
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._choices import ClusterInit, ClusterUpdate, Impl, Metric
from .._distributed import all_gather_rows, rank, world_size
from .._errors import UserError, import_extra, is_installed, reason
from .._files import write_atomically, write_text_atomically
from ..ops._kmeans_fit import KMeansOptions, KMeansProgress
from ..ops._kmeans_vectors import Stage
from ..ops.kmeans import check_options, check_weights, read_vectors, unavailable
from ..ops.nearest_code import check_metric
from ..ops.residual_kmeans import fit_stage
from .identifiers import collisions, number_collisions
from .pictures import write_sizes
from .vector_files import SUFFIXES, open_vectors, open_weights


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """What the result depends on."""

    codes: int
    stages: int = 3
    iterations: int = 25
    init: ClusterInit = "k-means++"
    n_init: int = 1
    metric: Metric = "euclidean"
    update: ClusterUpdate = "lloyd"
    batch_size: int | None = None
    balance: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Clustering:
    """Codebooks and identifiers."""

    codebooks: Tensor
    """[stages, K, D]"""
    indices: Tensor
    """int64 [N, stages]; with one more column, if asked for, that makes the identifiers distinct."""
    counts: Tensor
    """[stages, K]"""
    report: dict[str, Any]
    """Errors, collisions and sizes of the clusters, as in the .json file."""
    written: list[Path]
    """The files, the identifiers first."""


def cluster_file(
    path: Path,
    settings: ClusterSettings,
    out: Path,
    *,
    name: str | None = None,
    weights: Path | None = None,
    distinct: bool = False,
    resume: bool = False,
    device: torch.device | None = None,
    progress: Callable[[KMeansProgress], Any] | None = None,
) -> Clustering:
    """Cluster the vectors of a file, and write their identifiers and the codebooks.

    The vectors of an .npy file are read in chunks, so on the CPU they may be larger than memory. After every stage the state is kept in
    OUT.resume, until the end.

    Every rank of torch.distributed must call this, with the same arguments but for the device. Each clusters its part of the vectors, the
    first rank writes the files, and all return the result, which is that of one process (on CUDA up to rounding).

    Args:
        path, name: see `open_vectors`.
        weights: an .npy file with a weight for each vector: one of weight 2 counts as two vectors. See `kmeans`.
        settings: what the result depends on.
        out: identifiers, int32 [N, stages], in an .npy file with the codebooks in OUT.codebooks.npy; both in an .npz file; or as columns
            code_0, code_1, ... in a .parquet file. OUT.json has the report, and OUT.png a picture if matplotlib is installed, OUT being
            `out` without its suffix.
        distinct: add a code that numbers the vectors of each identifier.
        resume: continue with the stage that OUT.resume lacks. The result is that of one run.
        device: for the clustering; the CPU by default.
        progress: the callback of `residual_kmeans`, with the indices of the rank's vectors.

    Raises:
        UserError: an invalid file, setting or state, or a file that cannot be written.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"identifiers must go to a file of {', '.join(SUFFIXES)}, got {str(out)!r}.")
    if out.suffix == ".parquet":
        import_extra("pyarrow.parquet", "pyarrow", "cluster")
    x = open_vectors(path, name)
    mass = None if weights is None else open_weights(weights, x.shape[0])
    state = out.with_name(out.name + ".resume")
    described = {**dataclasses.asdict(settings), "shape": list(x.shape), "dtype": str(x.dtype)}
    if mass is not None:
        described["weights"] = float(mass.double().sum())
    found = _load_state(state, described) if resume else []
    started = time.perf_counter()
    try:
        check_weights("kmeans", mass, x, 1)
        variance = _fit(x, mass, settings, found, state, described, device, progress)
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(error).rstrip('.')}.") from error
    codebooks, columns, counts, inertia = (torch.stack(parts) for parts in zip(*found, strict=True))
    indices = columns.T
    report = _report(settings, x, described.get("weights"), indices, counts, inertia, variance)
    report["seconds"] = round(time.perf_counter() - started, 2)
    if distinct:
        indices = torch.cat([indices, number_collisions(indices).unsqueeze(1)], 1)
    written = _written(out)
    if rank() == 0:
        _write(out, codebooks, indices, counts, report)
        state.unlink(missing_ok=True)
    return Clustering(codebooks, indices, counts, report, written)


def _fit(
    x: Tensor,
    weights: Tensor | None,
    settings: ClusterSettings,
    found: list[tuple[Tensor, ...]],
    state: Path,
    described: dict[str, Any],
    device: torch.device | None,
    progress: Callable[[KMeansProgress], Any] | None,
) -> float:
    """Add the missing stages to `found`: codebook, indices [N], counts and inertia of each, on the CPU. Returns the inertia of the mean."""
    plain = KMeansOptions(1, "random", 1, "lloyd", None, None, None, torch.Generator().manual_seed(0), None)
    options = KMeansOptions(
        settings.iterations, settings.init, settings.n_init, settings.update, settings.batch_size, None, settings.balance, None, progress
    )
    ranks = world_size()
    check_metric("kmeans", settings.metric)
    check_options("kmeans", settings.codes, options)
    bounds = [x.shape[0] * i // ranks for i in range(ranks + 1)]
    share = slice(bounds[rank()], bounds[rank() + 1])
    part, weights = x[share].to(device), None if weights is None else weights[share].to(device)
    impl: Impl = next(name for name, failure in unavailable(part.device, part.dtype).items() if failure is None)
    with torch.no_grad():
        data = read_vectors("kmeans", part, 1, settings.metric, impl, weights, True)
        done = [Stage(codebook.to(device), indices[share].to(device).unsqueeze(1)) for codebook, indices, *_ in found]
        for stage in range(len(found), settings.stages):
            # Each stage has its own random numbers, whether or not the earlier ones were resumed.
            generator = torch.Generator().manual_seed((settings.seed + stage) % (1 << 63))
            codebook, indices, counts, inertia = fit_stage(data, done, settings.codes, options._replace(generator=generator), stage)
            done.append(Stage(codebook, indices))
            whole = indices.flatten() if ranks == 1 else all_gather_rows(indices.flatten(), [b - a for a, b in pairwise(bounds)])
            found.append((codebook.cpu(), whole.cpu(), counts.cpu(), inertia.cpu()))
            if rank() == 0:
                _save_state(state, described, found)
        centered = data if settings.metric == "euclidean" else data.residual(())
        return float(fit_stage(centered, [], 1, plain, 0)[3])


def _report(
    settings: ClusterSettings, x: Tensor, weight: float | None, indices: Tensor, counts: Tensor, inertia: Tensor, variance: float
) -> dict[str, Any]:
    shared = collisions(indices)
    total = x.shape[0] if weight is None else weight
    share = counts.double() / counts.double().sum(1, keepdim=True)
    return {
        **dataclasses.asdict(settings),
        "vectors": x.shape[0],
        "dim": x.shape[1],
        "weight": total,
        # By stage, of vectors by their weight.
        "mean_squared_distance": [float(value) / total for value in inertia],
        "explained": [1 - float(value) / variance if variance > 0 else 1.0 for value in inertia],
        "largest_cluster": [float(value) * settings.codes for value in share.amax(1)],
        "empty_codes": (counts == 0).sum(1).tolist(),
        "perplexity": [float(value) for value in torch.special.entr(share).sum(1).exp()],
        # Of whole identifiers, of vectors whatever their weight.
        "distinct_identifiers": shared.distinct,
        "colliding_vectors": shared.vectors,
        "most_of_one_identifier": shared.most,
    }


def _written(out: Path) -> list[Path]:
    """The files of the result."""
    suffixes = [".codebooks.npy"] * (out.suffix != ".npz") + [".json"] + [".png"] * is_installed("matplotlib")
    return [out, *(out.with_suffix(suffix) for suffix in suffixes)]


def _write(out: Path, codebooks: Tensor, indices: Tensor, counts: Tensor, report: dict[str, Any]) -> None:
    identifiers, books = indices.to(torch.int32).numpy(), codebooks.numpy()
    try:
        if out.suffix == ".npz":
            write_atomically(out, lambda file: np.savez(file, ids=identifiers, codebooks=books))
        else:
            if out.suffix == ".npy":
                write_atomically(out, lambda file: np.save(file, identifiers))
            else:
                pyarrow, parquet = (import_extra(module, "pyarrow", "cluster") for module in ("pyarrow", "pyarrow.parquet"))
                table = pyarrow.table({f"code_{i}": np.ascontiguousarray(column) for i, column in enumerate(identifiers.T)})
                write_atomically(out, lambda file: parquet.write_table(table, file))
            write_atomically(out.with_suffix(".codebooks.npy"), lambda file: np.save(file, books))
        write_text_atomically(out.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
        if is_installed("matplotlib"):
            write_sizes(out.with_suffix(".png"), counts)
    except OSError as error:
        raise UserError(f"results cannot be written to {str(out.parent)!r}: {reason(error)}.") from error


def _save_state(state: Path, described: dict[str, Any], found: list[tuple[Tensor, ...]]) -> None:
    arrays: dict[str, Any] = {
        f"{name}_{i}": part.cpu().numpy() for i, stage in enumerate(found) for name, part in zip(_PARTS, stage, strict=True)
    }
    try:
        write_atomically(state, lambda file: np.savez(file, settings=np.array(json.dumps(described)), **arrays))
    except OSError as error:
        raise UserError(f"the state cannot be written to {str(state)!r}: {reason(error)}.") from error


_PARTS = ("codebook", "indices", "counts", "inertia")


def _load_state(state: Path, described: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    if not state.exists():
        raise UserError(f"there is nothing to resume: no file {str(state)!r}.")
    try:
        with np.load(state, allow_pickle=False) as file:
            before = json.loads(str(file["settings"]))
            stages = sum(name.startswith("codebook_") for name in file.files)
            found = [tuple(torch.from_numpy(np.array(file[f"{name}_{i}"])) for name in _PARTS) for i in range(stages)]
    except Exception as error:  # damaged files raise exceptions of many classes
        raise UserError(f"the state cannot be read from {str(state)!r}: {reason(error)}.") from error
    # Settings that a state of an earlier version lacks had their default.
    before = {field.name: field.default for field in dataclasses.fields(ClusterSettings)} | before
    for key in described | before:
        value = described.get(key)
        if before.get(key) != value and key != "stages":
            raise UserError(f"a run is resumed with its own data and settings; {key} was {before.get(key)!r}, got {value!r}.")
    return found[: described["stages"]]
