"""Nearest-code search, float32: genperf against plain PyTorch, torch.compile, faiss and vector-quantize-pytorch.

Every contender is first checked against float64 on a sample of rows: genperf must have none wrong, the share of the others
is reported.
"""

import pytest
import torch

import genperf

from measure import measure, skip_too_large  # isort: skip
from workloads import WORKLOADS  # isort: skip

SAMPLED_DISTANCES = 3e7


def genperf_search(x, codebook, compiled):
    return lambda: genperf.nearest_code(x, codebook)


def torch_cdist(x, codebook, compiled):
    return lambda: torch.cdist(x, codebook).argmin(1)


def torch_compile(x, codebook, compiled):
    def lines(x, codebook):
        return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)

    search = compiled(lines, dynamic=True)
    return lambda: search(x, codebook)


def faiss_flat(x, codebook, compiled):
    faiss = pytest.importorskip("faiss")
    if x.is_cuda:
        pytest.skip("faiss-cpu has no CUDA search")
    # The default is far slower for short queries; this is what faiss can do.
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


CONTENDERS = {
    "genperf": (genperf_search, 0),
    "torch.cdist+argmin": (torch_cdist, 8),
    "torch.compile": (torch_compile, 8),
    "faiss": (faiss_flat, 0),
    "vector-quantize-pytorch": (vector_quantize_pytorch_eval, 24),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_nearest_code(benchmark, workload, contender, size, compiled, device):
    name, n, k, d = size(workload)
    make, bytes_per_pair = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * k)
    x, codebook = torch.randn(n, d, device=device), torch.randn(k, d, device=device)
    search = make(x, codebook, compiled)

    rows = torch.randperm(n, device=device)[: max(16, int(SAMPLED_DISTANCES / k / d))]
    exact = genperf.nearest_code(x[rows], codebook, impl="reference")
    wrong = (search()[rows] != exact).float().mean().item()
    if contender == "genperf":
        assert wrong == 0
    else:
        assert wrong < 0.1, f"{contender} disagrees in {wrong:.0%} of the rows: not the same search"

    measure(
        benchmark, search, device, flops=2.0 * n * k * d, moved=4 * (n + k) * d + 8 * n, pairs=n * k,
        op="nearest_code", workload=name, N=n, K=k, D=d, contender=contender, wrong_rows=wrong,
    )  # fmt: skip
