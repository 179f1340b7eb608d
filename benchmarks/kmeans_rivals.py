# SPDX-License-Identifier: Apache-2.0
"""K-means, or identifiers of three codes with --identifiers, beside other packages, in turn: processor seconds of one thread, and errors.

python benchmarks/kmeans_rivals.py [--identifiers] [--repeats N] [--sizes N,K,D ...]

Processor time is what a busy machine leaves comparable. Rivals run where they are installed: superkmeans, faiss-cpu, semantic-id.

K-means takes ten iterations on normal vectors. SuperKMeans is approximate; faiss and genperf assign exactly. genperf's own initial codes
count, and so do those of the others, which are random vectors.

Identifiers are those of vectors as an encoder gives them: clusters whose sizes follow Zipf's law, with variances that fall with the
dimension. genperf, faiss (its default, train_progressive_dim, with a beam) and semantic-id fit the codebooks and assign the vectors.
semantic-id runs scikit-learn's k-means once for each stage, or k-means-constrained, which takes minutes for more than a few thousand
vectors. The error is that of the reconstruction, relative to the variance.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":
    # Threads of one runtime that spin would starve the other; that of scikit-learn has no other way to be told.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
import torch
from torch import Tensor

import genperf
from genperf.clustering import collisions

ITERATIONS = 10
SIZES = ("100000,1024,128", "50000,4096,768")

STAGES, STAGE_ITERATIONS = 3, 25
IDENTIFIER_SIZES = ("5000,64,256", "20000,256,768")
# Vectors x codes for which k-means-constrained, a minimum-cost flow in every iteration, takes a minute.
MOST_CONSTRAINED = 5000 * 64


def superkmeans(x: np.ndarray, codes: int, threads: int, iterations: int = ITERATIONS) -> Callable[[], np.ndarray]:
    """SuperKMeans with all vectors in all iterations, from random vectors of its own.

    Raises:
        ImportError: it is not installed.
    """
    from superkmeans import SuperKMeans

    options = {"hierarchical": False, "sampling_fraction": 1.0, "max_points_per_cluster": len(x), "early_termination": False}
    return lambda: SuperKMeans(codes, x.shape[1], iters=iterations, n_threads=threads, **options).train(x)


def contenders(x: np.ndarray, codes: int, threads: int = 1) -> dict[str, Callable[[], np.ndarray]]:
    vectors = torch.from_numpy(x)

    def of_genperf(**options: Any) -> Callable[[], np.ndarray]:
        generator = torch.Generator().manual_seed(0)
        return lambda: genperf.kmeans(vectors, codes, generator=generator, **options).codebook.numpy()

    found = {
        "genperf": of_genperf(iterations=ITERATIONS),
        "genperf, random start": of_genperf(iterations=ITERATIONS, init="random"),
        "genperf, ema, 3 passes": of_genperf(iterations=3, init="random", update="ema"),
    }
    try:
        found["SuperKMeans"] = superkmeans(x, codes, threads)
    except ImportError:
        print("superkmeans is not installed")
    try:
        import faiss

        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = 1

        def cluster() -> np.ndarray:
            kmeans = faiss.Kmeans(x.shape[1], codes, niter=ITERATIONS, max_points_per_centroid=len(x), min_points_per_centroid=1)
            kmeans.train(x)
            return kmeans.centroids

        found["faiss"] = cluster
    except ImportError:
        print("faiss is not installed")
    return found


def embeddings(count: int, dim: int) -> Tensor:
    """Vectors of 1000 clusters, the k-th of which is as large as 1 / k, with the variance 1 / d in dimension d."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1000, dim, generator=generator)
    labels = torch.multinomial(1 / torch.arange(1.0, 1001), count, replacement=True, generator=generator)
    x = centers[labels] + 0.7 * torch.randn(count, dim, generator=generator)
    return x * torch.arange(1.0, dim + 1).rsqrt()


def identifier_contenders(x: Tensor, codes: int) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Functions that return identifiers [N, stages] and reconstructions [N, D]."""

    def of_genperf(**options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        def cluster() -> tuple[Tensor, Tensor]:
            options["generator"] = torch.Generator().manual_seed(0)
            found = genperf.residual_kmeans(x, codes, STAGES, **options)
            return found.indices, decoded(found.indices, found.codebooks)

        return cluster

    found = {
        "genperf": of_genperf(iterations=STAGE_ITERATIONS),
        "genperf, ema, 4 passes": of_genperf(iterations=4, update="ema"),
        "genperf, balance 1.05": of_genperf(iterations=STAGE_ITERATIONS, balance=1.05),
    }
    try:
        import faiss

        def residual_quantizer(beam: int) -> Callable[[], tuple[Tensor, Tensor]]:
            def cluster() -> tuple[Tensor, Tensor]:
                faiss.omp_set_num_threads(1)
                bits = (codes - 1).bit_length()
                quantizer = faiss.ResidualQuantizer(x.shape[1], STAGES, bits)
                quantizer.max_beam_size = beam
                quantizer.train(x.numpy())
                packed = quantizer.compute_codes(x.numpy())
                indices = faiss.unpack_bitstrings(packed, STAGES, bits)
                return torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(quantizer.decode(packed))

            return cluster

        found |= {f"faiss ResidualQuantizer, beam {beam}": residual_quantizer(beam) for beam in (1, 5)}
    except ImportError:
        print("faiss is not installed")
    try:
        from semantic_id import RQKMeans

        def of_semantic_id(implementation: str) -> Callable[[], tuple[Tensor, Tensor]]:
            def cluster() -> tuple[Tensor, Tensor]:
                options = {"implementation": implementation, "max_iter": STAGE_ITERATIONS, "n_init": 1, "random_state": 0}
                with joblib.parallel_config(backend="sequential"):  # or else it starts a process for each core
                    model = RQKMeans(STAGES, codes, **options).fit(x.numpy())
                indices = torch.from_numpy(model.encode(x.numpy()).astype(np.int64))
                return indices, decoded(indices, torch.from_numpy(np.stack(model.codebooks_)).float())

            return cluster

        import joblib

        found["semantic-id"] = of_semantic_id("kmeans")
        if len(x) * codes <= MOST_CONSTRAINED:
            found["semantic-id, constrained"] = of_semantic_id("constrained")
    except ImportError:
        print("semantic-id is not installed")
    return found


def decoded(indices: Tensor, codebooks: Tensor) -> Tensor:
    return torch.stack([codebook[index] for codebook, index in zip(codebooks, indices.unbind(1), strict=True)]).sum(0)


def in_turn(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, Any]]:
    """The least processor seconds of each, and what it returned."""
    found: dict[str, tuple[float, Any]] = {}
    for _ in range(repeats):
        for name, cluster in cases.items():
            start = time.process_time()
            result = cluster()
            seconds = time.process_time() - start
            found[name] = min(seconds, found[name][0]) if name in found else seconds, result
    return found


def compare_kmeans(sizes: Sequence[tuple[int, int, int]], repeats: int) -> None:
    print("| vectors, codes, D | | processor seconds | inertia, of the best |\n|---|---|---|---|")
    for count, codes, dim in sizes:
        x = torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
        found = in_turn(contenders(x.numpy(), codes), repeats)
        inertia = {}
        for name, (_, centers) in found.items():
            codebook = torch.from_numpy(np.ascontiguousarray(centers))
            inertia[name] = float((x - codebook[genperf.nearest_code(x, codebook)]).double().square().sum())
        for name, (seconds, _) in found.items():
            print(f"| {count}, {codes}, {dim} | {name} | {seconds:.2f} | {inertia[name] / min(inertia.values()):.4f} |", flush=True)


def compare_identifiers(sizes: Sequence[tuple[int, int, int]], repeats: int) -> None:
    print("| vectors, codes, D | | processor seconds | error | distinct identifiers | vectors that share theirs | largest cluster |")
    print("|---|---|---|---|---|---|---|")
    for count, codes, dim in sizes:
        x = embeddings(count, dim)
        variance = (x - x.mean(0)).double().square().sum()
        for name, (seconds, (indices, reconstruction)) in in_turn(identifier_contenders(x, codes), repeats).items():
            error, shared = float((x - reconstruction).double().square().sum() / variance), collisions(indices)
            largest = max(int(index.bincount().max()) for index in indices.unbind(1)) * codes / count
            figures = f"{seconds:.2f} | {error:.4f} | {shared.distinct} | {shared.vectors} | {largest:.2f}"
            print(f"| {count}, {codes}, {dim} | {name} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identifiers", action="store_true", help="compare identifiers of three codes, not codebooks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", metavar="N,K,D")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare, sizes = (compare_identifiers, IDENTIFIER_SIZES) if arguments.identifiers else (compare_kmeans, SIZES)
    numbers = [tuple(map(int, size.split(","))) for size in arguments.sizes or sizes]
    compare([(count, codes, dim) for count, codes, dim in numbers], arguments.repeats)


if __name__ == "__main__":
    main()
