# SPDX-License-Identifier: Apache-2.0
"""minibatch_similarity for CUDA, run on the CPU by cuda_on_host.h."""

import ctypes
import itertools

import pytest
import torch
from cuda_on_host.harness import (
    DTYPES,
    assert_close,
    assert_each_barrier_is_needed,
    assert_each_kernel_runs,
    compile_kernels,
    fill,
    nan_like,
    run_checks,
    run_in_child,
    structure,
)
from cuda_on_host.launches import LAUNCHES
from torch import Tensor

# (N, B, C): less than a tile, several tiles, several chunks of channels with a partial one, empty tensors.
SHAPES = [(1, 2, 3), (5, 3, 8), (40, 2, 5), (33, 1, 32), (70, 2, 33), (35, 1, 130), (0, 3, 4), (3, 0, 4), (3, 4, 0)]

SIZES = ("samples kernels channels", ctypes.c_int64)
MinibatchSimilarityParams = structure(("features similarity", ctypes.c_void_p), SIZES)
MinibatchSimilarityBackwardParams = structure(("grad_similarity features grad_features", ctypes.c_void_p), SIZES)


def run(function, params: type[ctypes.Structure], features: Tensor, **fields: Tensor) -> None:
    sizes = dict(zip(("samples", "kernels", "channels"), features.shape, strict=True))
    filled = fill(params, features=features, **sizes, **fields)
    function(ctypes.byref(filled), DTYPES[features.dtype])


def exact_similarity(features: Tensor) -> Tensor:
    distance = (features.unsqueeze(0) - features.unsqueeze(1)).abs().sum(3)
    return (torch.exp(-distance) * (1 - torch.eye(features.shape[0]).unsqueeze(-1))).sum(1)


def cases():
    for number, (dtype, shape) in enumerate(itertools.product(DTYPES, SHAPES)):
        generator = torch.Generator().manual_seed(number)
        features = torch.randn(shape, generator=generator) / max(1, shape[2]) ** 0.5
        if shape[0] > 2:
            features[2] = features[0]  # a distance of zero, with a gradient of zero
        yield f"{dtype} {shape}", features.to(dtype), generator


def check_similarity(library: ctypes.CDLL) -> None:
    for name, features, _ in cases():
        similarity = nan_like(features.new_zeros(features.shape[:2]))
        run(library.minibatch_similarity, MinibatchSimilarityParams, features, similarity=similarity)
        exact = exact_similarity(features.double())
        assert_close(name, similarity, exact, exact * (1 + features.shape[2]), 2e-7)


def check_error_does_not_grow_with_the_channels(library: ctypes.CDLL) -> None:
    """Two samples at a distance of about 1, whose rounding is that of one number, not of a sum of 3000."""
    features = torch.rand(2, 3, 3000, generator=torch.Generator().manual_seed(0)) * 1e-3
    similarity = torch.zeros(2, 3)
    run(library.minibatch_similarity, MinibatchSimilarityParams, features, similarity=similarity)
    exact = exact_similarity(features.double())
    assert_close("many channels", similarity, exact, exact, 2e-7)


def check_backward(library: ctypes.CDLL) -> None:
    for name, features, generator in cases():
        grad = torch.randn(features.shape[:2], generator=generator).to(features.dtype)
        result = nan_like(features)
        fields = {"grad_similarity": grad, "grad_features": result}
        run(library.minibatch_similarity_backward, MinibatchSimilarityBackwardParams, features, **fields)
        leaf = features.double().requires_grad_()
        (exact,) = torch.autograd.grad((exact_similarity(leaf) * grad.double()).sum(), leaf)
        assert_close(name, result, exact, torch.full_like(exact, features.shape[0]), 1e-6)


def check_launches(library: ctypes.CDLL) -> None:
    features, grad = torch.randn(70, 2, 5), torch.randn(70, 2)
    before = library.cuda_on_host_launches()
    run(library.minibatch_similarity, MinibatchSimilarityParams, features, similarity=grad.clone())
    assert library.cuda_on_host_launches() - before == LAUNCHES["minibatch_similarity"]
    fields = {"grad_similarity": grad, "grad_features": nan_like(features)}
    run(library.minibatch_similarity_backward, MinibatchSimilarityBackwardParams, features, **fields)
    assert library.cuda_on_host_launches() - before == LAUNCHES["minibatch_similarity"] + LAUNCHES["minibatch_similarity_backward"]


def check_nan_stays_in_its_kernel(library: ctypes.CDLL) -> None:
    features = torch.randn(40, 2, 5)
    features[35, 1, 2] = float("nan")
    similarity, result = torch.zeros(40, 2), nan_like(features)
    run(library.minibatch_similarity, MinibatchSimilarityParams, features, similarity=similarity)
    assert torch.equal(similarity.isnan(), torch.tensor([False, True]).expand(40, 2))
    fields = {"grad_similarity": torch.ones(40, 2), "grad_features": result}
    run(library.minibatch_similarity_backward, MinibatchSimilarityBackwardParams, features, **fields)
    assert torch.equal(result.isnan(), torch.tensor([False, True])[:, None].expand(40, 2, 5))


CHECKS = [name for name in dir() if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = compile_kernels("similarity_launchers.cpp", tmp_path_factory.mktemp("kernels"))
    return run_in_child(__file__, library, CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_kernels(outcome: str, check: str) -> None:
    assert f"{check} passed" in outcome, outcome


def test_each_kernel_runs(outcome: str) -> None:
    assert_each_kernel_runs(outcome)


def test_each_barrier_is_needed(outcome: str) -> None:
    assert_each_barrier_is_needed(outcome)


if __name__ == "__main__":
    run_checks(globals())
