# SPDX-License-Identifier: Apache-2.0
"""The k nearest codes, float32: genperf against torch.cdist with topk, and faiss.

Every contender is first checked against float64 on a sample of rows: genperf must have no wrong row, that share of the others is
reported. genperf packs the codebook in every call.
"""

import functools

import pytest
import torch

import genperf

from bench_nearest_code import CHECKED_PRODUCTS, HELD_DISTANCES, keeps_codebooks  # isort: skip
from measure import first_result, measure, skip_too_large  # isort: skip
from workloads import NEIGHBORS  # isort: skip


def genperf_search(x, codebook, k):
    forget = torch.ops.genperf.forget_codebooks if keeps_codebooks(x) else lambda: None

    def search():
        # Afterwards, so that the next call has to pack again, in time and in memory.
        try:
            return genperf.nearest_codes(x, codebook, k)
        finally:
            forget()

    forget()
    return search


def torch_cdist(x, codebook, k):
    return lambda: torch.cdist(x, codebook).topk(k, largest=False).indices


def faiss_flat(x, codebook, k):
    faiss = pytest.importorskip("faiss")
    if x.is_cuda:
        pytest.skip("faiss-cpu has no CUDA search")
    # The default threshold makes faiss far slower for short vectors.
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.omp_set_num_threads(torch.get_num_threads())

    def search():
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        return torch.from_numpy(index.search(x.numpy(), k)[1])

    return search


# Each with the bytes that it holds for a pair of a vector and a code.
CONTENDERS = {"genperf": (genperf_search, 0), "torch.cdist+topk": (torch_cdist, 8), "faiss": (faiss_flat, 0)}


@functools.lru_cache(maxsize=1)
def case(n, num_codes, d, k, device):
    """Inputs, and the k nearest codes of some rows in float64, the same for every contender of a workload."""
    torch.manual_seed(0)
    x, codebook = torch.randn(n, d, device=device), torch.randn(num_codes, d, device=device)
    rows = torch.randperm(n, device=device)[: max(16, int(CHECKED_PRODUCTS / codebook.numel()))]
    direct = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    parts = x[rows].double().split(max(1, HELD_DISTANCES // num_codes))
    codes = codebook.double()
    return x, codebook, rows, torch.cat([direct(part, codes).topk(k, largest=False).indices for part in parts])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("workload", "k"), NEIGHBORS, ids=str)
def test_nearest_codes(benchmark, workload, k, contender, size, device):
    name, n, num_codes, d = size(workload)
    make, bytes_per_pair = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * num_codes)
    x, codebook, rows, exact = case(n, num_codes, d, k, device)
    search = make(x, codebook, k)

    found = search() if contender == "genperf" else first_result(contender, search, device)
    wrong = (found[rows] != exact).any(-1).float().mean().item()
    if contender == "genperf":
        assert wrong == 0
    else:
        assert wrong < 0.1, f"{contender} disagrees in {wrong:.0%} of the rows: not the same search"

    measure(
        benchmark, search, device, flops=2.0 * n * num_codes * d, moved=4 * (n + num_codes) * d + 8 * n * k, pairs=n * num_codes,
        op="nearest_codes", workload=name, N=n, K=num_codes, D=d, k=k, contender=contender, wrong_rows=wrong,
    )  # fmt: skip
