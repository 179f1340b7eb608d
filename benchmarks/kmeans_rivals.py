# SPDX-License-Identifier: Apache-2.0
"""Ten iterations of k-means beside faiss and SuperKMeans, in turn: processor seconds of one thread, and inertia.

python benchmarks/kmeans_rivals.py [--repeats N] [--sizes N,K,D ...]

Processor time is what a busy machine leaves comparable. SuperKMeans is approximate and runs where it is installed (`pip install
superkmeans`); faiss and genperf assign exactly. genperf's own initial codes count, and so do those of the others, which are random vectors.
"""

import argparse
import os
import time
from collections.abc import Callable

if __name__ == "__main__":
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads of one runtime that spin would starve the other

import numpy as np
import torch

import genperf

ITERATIONS = 10
SIZES = ("100000,1024,128", "50000,4096,768")


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

    def of_genperf(**options: object) -> Callable[[], np.ndarray]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="N,K,D")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| vectors, codes, D | | processor seconds | inertia, of the best |\n|---|---|---|---|")
    for size in arguments.sizes:
        count, codes, dim = map(int, size.split(","))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, dim, generator=generator)
        cases = contenders(x.numpy(), codes)
        seconds, inertia = dict.fromkeys(cases, float("inf")), {}
        for _ in range(arguments.repeats):
            for name, cluster in cases.items():  # in turn
                start = time.process_time()
                centers = cluster()
                seconds[name] = min(seconds[name], time.process_time() - start)
                codebook = torch.from_numpy(np.ascontiguousarray(centers))
                inertia[name] = float((x - codebook[genperf.nearest_code(x, codebook)]).double().square().sum())
        best = min(inertia.values())
        for name in cases:
            print(f"| {count}, {codes}, {dim} | {name} | {seconds[name]:.2f} | {inertia[name] / best:.4f} |", flush=True)


if __name__ == "__main__":
    main()
