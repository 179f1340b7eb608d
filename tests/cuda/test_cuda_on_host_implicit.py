# SPDX-License-Identifier: Apache-2.0
"""Finite scalar and lookup-free quantization for CUDA, run on the CPU by cuda_on_host.h."""

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from cuda_on_host.harness import (
    DTYPES,
    Strides,
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

import genperf

# (outer, levels, inner): one channel, partial tiles, several tiles, rows of full and of partial runs, many channels, many
# codes, more than 2^31 codes, no positions.
SHAPES = [
    (1, [5], 300),
    (3, [8, 5, 5, 5], 40),
    (2, [8, 6, 5], 129),
    (3, [4] * 31, 8),
    (1, [3, 2000, 7], 132),
    (2, [8, 8, 8, 5, 5, 5], 67),
    (70, [4, 3, 8, 5, 2, 7, 6, 9], 2),
    (1, [1 << 20, 1 << 20, 8], 20),
    (300, [7, 5, 5, 5, 5], 1),
    (1, [2] * 63, 10),
    (0, [8, 5], 4),
]
LAYOUTS = ("channels_first", "channels_last", "permuted", "sliced")

POINTERS = ("x quantized indices", ctypes.c_void_p)
GRADIENTS = ("grad_quantized x grad_x", ctypes.c_void_p)
SIZES = ("outer channels inner", ctypes.c_int64)
LEVELS = [("levels", ctypes.c_int32 * 64), ("symmetric hard", ctypes.c_bool)]
STRIDES, GRADIENT_STRIDES = ("x_strides quantized_strides", Strides), ("grad_quantized_strides x_strides grad_x_strides", Strides)
FiniteParams = structure(POINTERS, SIZES, STRIDES, *LEVELS)
FiniteBackwardParams = structure(GRADIENTS, SIZES, GRADIENT_STRIDES, *LEVELS)
SignParams = structure(POINTERS, SIZES, STRIDES, ("size", ctypes.c_float))
SignBackwardParams = structure(GRADIENTS, SIZES, GRADIENT_STRIDES, ("scale", ctypes.c_float))


def call(function, params: type[ctypes.Structure], x: Tensor, levels: list[int] | None = None, **fields: object) -> None:
    sizes = dict(zip(("outer", "channels", "inner"), x.shape, strict=True))
    if levels is not None:
        fields["levels"] = (ctypes.c_int32 * 64)(*levels)
    function(ctypes.byref(fill(params, x=x, **sizes, **fields)), DTYPES[x.dtype])


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x [outer, D, inner] in a layout; channels_last has all positions in `outer`."""
    outer, channels, inner = x.shape
    if layout == "channels_last":
        return x.transpose(1, 2).reshape(outer * inner, channels, 1)
    if layout == "permuted":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = torch.empty(outer, channels + 1, 2 * inner + 3, dtype=x.dtype)
        return wide[:, 1:, 3 : 3 + 2 * inner : 2].copy_(x)
    return x.contiguous()


def cases():
    for number, (dtype, layout, (outer, levels, inner)) in enumerate(itertools.product(DTYPES, LAYOUTS, SHAPES)):
        if dtype != torch.float32 and (number + number // len(SHAPES)) % 2:
            continue
        generator = torch.Generator().manual_seed(number)
        x, grad = torch.randn(2, outer, len(levels), inner, generator=generator)
        x.view(-1)[::17] *= 100
        yield number, f"{dtype} {layout} {levels}", lay_out(x.to(dtype), layout), lay_out(grad.to(dtype), layout), levels


def check_blocks_with_several_tiles(library: ctypes.CDLL) -> None:
    x = torch.randn(4096 * 128 + 130, 1, 1)
    quantized, indices = nan_like(x), torch.full((x.shape[0], 1), -7)
    call(library.lookup_free_quantize, SignParams, x, quantized=quantized, indices=indices, size=1.0)
    assert torch.equal(quantized, torch.where(x > 0, 1.0, -1.0))
    assert torch.equal(indices, (x[:, 0] > 0).long())


def check_finite_scalar(library: ctypes.CDLL) -> None:
    for number, name, x, grad, levels in cases():
        symmetric, hard = bool(number % 3 == 0), bool(number % 5 == 0)
        options = {"symmetric": symmetric, "hard": hard}
        for indexed in (True, False):
            quantized = nan_like(x)
            indices = torch.full((x.shape[0], x.shape[2]), -7) if indexed else None
            call(library.finite_scalar_quantize, FiniteParams, x, levels, quantized=quantized, indices=indices, **options)
            # Bitwise equal to the CPU kernel.
            expected, places = torch.ops.genperf.finite_scalar_quantize(x, levels, symmetric, hard, True)
            assert torch.equal(quantized, expected), name
            assert not indexed or torch.equal(indices, places), name
        grad_x = nan_like(x)
        call(library.finite_scalar_quantize_backward, FiniteBackwardParams, x, levels, grad_quantized=grad, grad_x=grad_x, **options)
        expected = torch.ops.genperf.finite_scalar_quantize_backward(grad, x, levels, symmetric, hard)
        torch.testing.assert_close(grad_x, expected, msg=lambda text, name=name: f"{name}: {text}")


def check_few_channels(library: ctypes.CDLL) -> None:
    """Every number of channels that has a kernel of its own, in every dtype."""
    for dtype, channels, layout in itertools.product(DTYPES, range(1, 10), ("channels_first", "channels_last")):
        levels = [5, 4, 8, 3, 6, 2, 7, 5, 3][:channels]
        x, grad = (lay_out(torch.randn(2, channels, 19).to(dtype), layout) for _ in range(2))
        quantized, indices, grad_x = nan_like(x), torch.full((x.shape[0], x.shape[2]), -7), nan_like(x)
        call(library.finite_scalar_quantize, FiniteParams, x, levels, quantized=quantized, indices=indices)
        expected, places = torch.ops.genperf.finite_scalar_quantize(x, levels, False, False, True)
        assert torch.equal(quantized, expected), f"{dtype} {levels} {layout}"
        assert torch.equal(indices, places), f"{dtype} {levels} {layout}"
        call(library.finite_scalar_quantize_backward, FiniteBackwardParams, x, levels, grad_quantized=grad, grad_x=grad_x)
        torch.testing.assert_close(grad_x, torch.ops.genperf.finite_scalar_quantize_backward(grad, x, levels, False, False))


def check_lookup_free(library: ctypes.CDLL) -> None:
    for _, name, x, grad, _ in cases():
        for spherical in (True, False):
            expected, places = torch.ops.genperf.lookup_free_quantize(x, 0.7, spherical)
            quantized, indices = nan_like(x), torch.full((x.shape[0], x.shape[2]), -7)
            size = 0.7 / x.shape[1] ** 0.5 if spherical else 0.7
            call(library.lookup_free_quantize, SignParams, x, quantized=quantized, indices=indices, size=size)
            assert torch.equal(quantized, expected), name
            assert torch.equal(indices, places), name
        grad_x = nan_like(x)
        call(library.lookup_free_quantize_backward, SignBackwardParams, x, grad_quantized=grad, grad_x=grad_x, scale=0.7)
        expected = torch.ops.genperf.lookup_free_quantize_backward(grad, x, 0.7)
        torch.testing.assert_close(grad_x, expected, msg=lambda text, name=name: f"{name}: {text}")


def check_division(library: ctypes.CDLL) -> None:
    """Multiplication by the inverse and one correction round as IEEE division does."""
    for levels in (*range(2, 300), 1000, 1023, 1024, 4097, 65535):
        assert library.wrong_quotients(levels, False) == library.wrong_quotients(levels, True) == 0


def check_launches(library: ctypes.CDLL) -> None:
    x, levels = torch.randn(3, 4, 50), {"levels": [8, 5, 5, 5]}
    outputs = {"quantized": nan_like(x), "indices": torch.full((3, 50), -7)}
    gradients = {"grad_quantized": torch.randn(3, 4, 50), "grad_x": nan_like(x)}
    for op, params, fields in (
        ("finite_scalar_quantize", FiniteParams, levels | outputs),
        ("finite_scalar_quantize_backward", FiniteBackwardParams, levels | gradients),
        ("lookup_free_quantize", SignParams, outputs),
        ("lookup_free_quantize_backward", SignBackwardParams, gradients),
    ):
        before = library.cuda_on_host_launches()
        call(getattr(library, op), params, x, **fields)
        assert library.cuda_on_host_launches() - before == LAUNCHES[op]


def check_special_values(library: ctypes.CDLL) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30]).reshape(2, 3, 1)
    quantizers = (
        (library.finite_scalar_quantize, FiniteParams, {"levels": [8, 5, 4]}, genperf.finite_scalar_quantize),
        (library.lookup_free_quantize, SignParams, {"size": 1.0}, genperf.lookup_free_quantize),
    )
    for dtype, (function, params, options, run) in itertools.product(DTYPES, quantizers):
        x = special.to(dtype)
        quantized, indices = torch.full_like(x, 77), torch.full((2, 1), -7)
        call(function, params, x, quantized=quantized, indices=indices, **options)
        expected, places = run(x, *([options["levels"]] if "levels" in options else []), channel_dim=1)
        torch.testing.assert_close(quantized, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices, places)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels("implicit_launchers.cpp", tmp_path_factory.mktemp("kernels"))


CHECKS = [name for name in dir() if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcome(library: Path) -> str:
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
