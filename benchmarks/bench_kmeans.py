# SPDX-License-Identifier: Apache-2.0
"""Ten iterations of Lloyd's algorithm from the same random points, float32: genperf beside plain PyTorch, faiss, scikit-learn, SuperKMeans.

The sum of squared distances to the nearest code is first checked to be within 1% of that of plain PyTorch. SuperKMeans assigns
approximately, and starts from random points of its own, so that with few points it reaches a sum that differs by more.
"""

import functools

import pytest
import torch

import genperf

from kmeans_rivals import superkmeans  # isort: skip
from measure import measure, skip_too_large  # isort: skip
from workloads import Workload  # isort: skip

ITERATIONS = 10
# Initial codebooks of quantizers, with many and with few points for each code, a coarse quantizer of an index, identifiers of embeddings.
CLUSTERINGS = (
    Workload("VQ-VAE", 16384, 512, 64),
    Workload("TiTok", 16384, 4096, 12),
    Workload("coarse quantizer", 65536, 1024, 64),
    Workload("embeddings", 100000, 1024, 128),
)


def genperf_kmeans(x, first):
    return lambda: genperf.kmeans(x, len(first), iterations=ITERATIONS, init=first).codebook


def plain_lines(x, first):
    def cluster():
        codebook = first
        for _ in range(ITERATIONS):
            indices = torch.cdist(x, codebook).argmin(1)
            counts = torch.bincount(indices, minlength=len(codebook)).unsqueeze(1)
            sums = torch.zeros_like(codebook).index_add_(0, indices, x)
            codebook = torch.where(counts > 0, sums / counts, codebook)
        return codebook

    return cluster


def faiss_kmeans(x, first):
    faiss = pytest.importorskip("faiss")
    if x.is_cuda:
        pytest.skip("faiss-cpu has no CUDA k-means")
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.omp_set_num_threads(torch.get_num_threads())

    def cluster():
        # Use all points; the default samples 256 for each code.
        every = {"max_points_per_centroid": len(x), "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(x.shape[1], len(first), niter=ITERATIONS, nredo=1, **every)
        kmeans.train(x.numpy(), init_centroids=first.numpy())
        return torch.from_numpy(kmeans.centroids)

    return cluster


def scikit_learn_kmeans(x, first):
    cluster_package = pytest.importorskip("sklearn.cluster")
    if x.is_cuda:
        pytest.skip("scikit-learn has no CUDA k-means")

    def cluster():
        kmeans = cluster_package.KMeans(len(first), init=first.numpy(), n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
        return torch.from_numpy(kmeans.fit(x.numpy()).cluster_centers_)

    return cluster


def super_kmeans(x, first):
    pytest.importorskip("superkmeans")
    if x.is_cuda:
        pytest.skip("SuperKMeans has no CUDA k-means")
    cluster = superkmeans(x.numpy(), len(first), torch.get_num_threads(), ITERATIONS)
    return lambda: torch.from_numpy(cluster().copy())


CONTENDERS = {
    "genperf": (genperf_kmeans, 0),
    "PyTorch": (plain_lines, 8),
    "faiss": (faiss_kmeans, 0),
    "scikit-learn": (scikit_learn_kmeans, 0),
    "SuperKMeans": (super_kmeans, 0),
}


def inertia(x, codebook):
    return (x - codebook[genperf.nearest_code(x, codebook)]).double().square().sum().item()


@functools.lru_cache(maxsize=1)
def case(n, k, d, device):
    """Points, initial codes and expected sum of squares, the same for every contender."""
    torch.manual_seed(0)
    x = torch.randn(n, d, device=device)
    first = x[torch.randperm(n, device=device)[:k]]
    return x, first, inertia(x, plain_lines(x, first)())


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", CLUSTERINGS, ids=str)
def test_kmeans(benchmark, workload, contender, size, device):
    name, n, k, d = size(workload)
    k = min(k, n // 4)
    make, bytes_per_pair = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * k)
    x, first, expected = case(n, k, d, device)
    cluster = make(x, first)
    codebook = cluster()
    assert codebook.shape == first.shape
    assert inertia(x, codebook) == pytest.approx(expected, rel=0.1 if contender == "SuperKMeans" and n < 1000 else 0.01)
    measure(
        benchmark, cluster, device, flops=2.0 * ITERATIONS * n * k * d, pairs=ITERATIONS * n * k,
        op="kmeans", workload=name, N=n, K=k, D=d, contender=contender,
    )  # fmt: skip
