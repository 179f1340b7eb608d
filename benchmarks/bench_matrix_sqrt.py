# SPDX-License-Identifier: Apache-2.0
"""The square root of a symmetric positive definite matrix, forward and backward, float64."""

import pytest
import torch

import genperf

from frechet_cases import newton_schulz, symmetric_root  # isort: skip
from measure import measure  # isort: skip


def scipy_sqrtm(a):
    linalg = pytest.importorskip("scipy.linalg")
    return torch.from_numpy(linalg.sqrtm(a.detach().cpu().numpy())).to(a.device)


def newton_schulz_root(a):
    return newton_schulz(a, 20)


CONTENDERS = {
    "genperf": genperf.matrix_sqrt,
    "torch.linalg.eigh": symmetric_root,
    "Newton-Schulz": newton_schulz_root,
    "scipy": scipy_sqrtm,  # forward only
}


def covariance(d, device):
    features = torch.randn(4 * d, d, dtype=torch.float64, device=device)
    return features.T @ features / len(features)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("d", [256, 1024])
def test_matrix_sqrt(benchmark, d, contender, size, device):
    (d,) = size((d,))
    a = covariance(d, device)
    function = CONTENDERS[contender]
    root = function(a)
    torch.testing.assert_close(root @ root, a, rtol=1e-9, atol=1e-9 * float(a.abs().max()))
    measure(
        benchmark, lambda: function(a), device, moved=2 * 8 * d * d,
        op="matrix_sqrt", workload="forward, float64", contender=contender, D=d,
    )  # fmt: skip


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "scipy"])
def test_matrix_sqrt_gradient(benchmark, contender, size, device):
    (d,) = size((512,))
    a = covariance(d, device).requires_grad_()
    weight = torch.randn(d, d, dtype=torch.float64, device=device)
    function = CONTENDERS[contender]

    def step():
        return torch.autograd.grad(function(a), a, weight)[0]

    found = step()
    # Solve root X + X root = sym(weight) in the basis of the eigenvectors.
    values, vectors = torch.linalg.eigh(a.detach())
    inner = vectors.T @ (weight + weight.T) / 2 @ vectors / (values.sqrt()[:, None] + values.sqrt())
    exact = vectors @ inner @ vectors.T
    assert (sym(found) - exact).norm() < 1e-8 * exact.norm()
    measure(
        benchmark, step, device, moved=4 * 8 * d * d,
        op="matrix_sqrt", workload="forward and backward, float64", contender=contender, D=d,
    )  # fmt: skip


def sym(a):
    return (a + a.T) / 2
