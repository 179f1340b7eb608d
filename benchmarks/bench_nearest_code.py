# SPDX-License-Identifier: Apache-2.0
"""Nearest-code search, float32: genperf against plain PyTorch, torch.compile, faiss, vector-quantize-pytorch and flash-kmeans.

Every contender is first checked against float64 on a sample of rows: genperf must have no wrong index, that share of the others is
reported. genperf packs the codebook in every call, except in the rows of the same codebook again, which reuse the packed one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import genperf

from measure import first_result, measure, skip_too_large  # isort: skip
from workloads import GPU_GOALS, SEARCHES  # isort: skip

# Limits of a float64 check: products, for about a second, and distances held at a time.
CHECKED_PRODUCTS = 1e8
HELD_DISTANCES = 1 << 20


def keeps_codebooks(x):
    """Whether a search of x caches the packed codebook for the next one, as the CPU kernel does."""
    return not x.is_cuda and hasattr(torch.ops.genperf, "forget_codebooks")


def genperf_search(x, codebook, compiled):
    forget = torch.ops.genperf.forget_codebooks if keeps_codebooks(x) else lambda: None

    def search():
        # Afterwards, so that the next call has to pack again, in time and in memory.
        try:
            return genperf.nearest_code(x, codebook)
        finally:
            forget()

    forget()
    return search


def genperf_again(x, codebook, compiled):
    if not keeps_codebooks(x):
        pytest.skip("packed codebooks are not cached here")
    return lambda: genperf.nearest_code(x, codebook)


def torch_cdist(x, codebook, compiled):
    return lambda: torch.cdist(x, codebook).argmin(1)


def torch_cdist_tf32(x, codebook, compiled):
    if not x.is_cuda:
        pytest.skip("TF32 is a format of CUDA's matrix units")

    def search():
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        try:
            return torch.cdist(x, codebook).argmin(1)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return search


def expanded(x, codebook):
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def torch_addmm(x, codebook, compiled):
    return lambda: expanded(x, codebook)


def torch_compile(x, codebook, compiled):
    search = compiled(expanded, dynamic=True)
    return lambda: search(x, codebook)


def faiss_flat(x, codebook, compiled):
    faiss = pytest.importorskip("faiss")
    if x.is_cuda:
        pytest.skip("faiss-cpu has no CUDA search")
    # The default threshold makes faiss far slower for short vectors.
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.omp_set_num_threads(torch.get_num_threads())

    def search():
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

    return search


def vector_quantize_pytorch_eval(x, codebook, compiled):
    package = pytest.importorskip("vector_quantize_pytorch")
    layer = package.VectorQuantize(codebook.shape[1], codebook.shape[0]).to(x.device).eval()
    layer._codebook.embed.copy_(codebook.unsqueeze(0))

    @torch.no_grad()
    def search():
        return layer(x.unsqueeze(0))[1][0]

    return search


def flash_kmeans_assign(x, codebook, compiled):
    if not x.is_cuda:
        pytest.skip("flash-kmeans' assignment is a CUDA kernel")
    assign = pytest.importorskip("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    import triton

    # The kernel needs a power of two of at least 16 dimensions; the padding is not timed.
    dim = codebook.shape[1]
    points, codes = (F.pad(t, (0, max(16, triton.next_power_of_2(dim)) - dim)).unsqueeze(0) for t in (x, codebook))

    def search():
        try:
            return assign(points, codes, points.square().sum(-1))[0]
        except triton.runtime.errors.OutOfResources as error:
            pytest.skip(f"flash-kmeans cannot run: {error}")

    return search


class Contender(NamedTuple):
    make: Callable  # (x [N, D], codebook [K, D], torch.compile) -> the search to call
    bytes_per_pair: int  # that it holds, about
    rounded: bool = False  # known to round its inputs


CONTENDERS = {
    "genperf": Contender(genperf_search, 0),
    "genperf, same codebook again": Contender(genperf_again, 0),
    "torch.cdist+argmin": Contender(torch_cdist, 8),
    "torch.cdist+argmin, TF32": Contender(torch_cdist_tf32, 8, rounded=True),
    "addmm": Contender(torch_addmm, 8),
    "torch.compile": Contender(torch_compile, 8),
    "faiss": Contender(faiss_flat, 0),
    "vector-quantize-pytorch": Contender(vector_quantize_pytorch_eval, 24),
    "flash-kmeans": Contender(flash_kmeans_assign, 0, rounded=True),
}


def checked_rows(x, codebook, products):
    """As many rows of x as `products` allows, and the indices of their nearest codes in float64."""
    rows = torch.randperm(x.shape[0], device=x.device)[: max(16, int(products / codebook.numel()))]
    # Several times faster than the reference, with the same result on such data.
    direct = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    parts = x[rows].double().split(max(1, HELD_DISTANCES // len(codebook)))
    codes = codebook.double()
    return rows, torch.cat([direct(part, codes).argmin(1) for part in parts])


@functools.lru_cache(maxsize=1)
def case(n, k, d, device):
    """Inputs and exact indices, the same for every contender of a workload; contenders of a workload are consecutive."""
    torch.manual_seed(0)
    x, codebook = torch.randn(n, d, device=device), torch.randn(k, d, device=device)
    return x, codebook, *checked_rows(x, codebook, CHECKED_PRODUCTS)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", dict.fromkeys((*SEARCHES, *GPU_GOALS)), ids=str)
def test_nearest_code(benchmark, workload, contender, size, compiled, device):
    if workload not in SEARCHES and device == "cpu" and not benchmark.disabled:
        pytest.skip("a size for GPUs")
    name, n, k, d = size(workload)
    make, bytes_per_pair, rounded = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * k)
    x, codebook, rows, exact = case(n, k, d, device)
    search = make(x, codebook, compiled)

    found = search() if contender.startswith("genperf") else first_result(contender, search, device)
    wrong = (found[rows] != exact).float().mean().item()
    if contender.startswith("genperf"):
        assert wrong == 0
    elif not rounded:
        assert wrong < 0.1, f"{contender} disagrees in {wrong:.0%} of the rows: not the same search"

    measure(
        benchmark, search, device, flops=2.0 * n * k * d, moved=4 * (n + k) * d + 8 * n, pairs=n * k,
        op="nearest_code", workload=name, N=n, K=k, D=d, contender=contender, wrong_rows=wrong,
    )  # fmt: skip
