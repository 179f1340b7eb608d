# SPDX-License-Identifier: Apache-2.0
"""vector_quantize and code_statistics for CUDA, run on the CPU by cuda_on_host.h; and the faults that it reports."""

import ctypes
import importlib
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_host.harness import (
    CSRC,
    DTYPES,
    HERE,
    Strides,
    compile_kernels,
    compile_on_host,
    kernels,
    nan_like,
    nans,
    run_checks,
    run_in_child,
)
from torch import Tensor

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
LAYOUTS = ("channels_last", "channels_first", "permuted", "sliced")

# (outer, D, inner, K): one channel, odd widths, widths of one and several vectors, teams of 1 to 32 threads, partial tiles,
# runs that end at the end of a chunk, no positions.
SHAPES = [
    (1, 1, 257, 7),
    (4, 3, 250, 300),
    (7, 7, 1, 1),
    (1, 31, 257, 7),
    (7, 33, 1, 300),
    (5, 64, 13, 7),
    (37, 130, 1, 300),
    (2, 8, 256, 7),
    (1, 128, 40, 7),
    (1, 64, 1, 7),
    (0, 64, 5, 7),
]


def _structure(pointers: str, sizes: str, strides: str, rest: list = ()) -> type[ctypes.Structure]:
    class Params(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_void_p) for name in pointers.split()),
            *((name, ctypes.c_int64) for name in sizes.split()),
            *((name, Strides) for name in strides.split()),
            *rest,
        ]

    return Params


def _codes(name: str) -> list[tuple[str, type]]:
    return [(f"{name}_stride", ctypes.c_int64), (f"{name}_channel_stride", ctypes.c_int64)]


SIZES = "outer channels inner num_codes"
VectorQuantizeParams = _structure(
    "x codebook indices quantized partials mse valid",
    SIZES,
    "x_strides quantized_strides",
    _codes("code"),
)
VectorQuantizeBackwardParams = _structure(
    "grad_quantized grad_mse x codebook indices valid grad_x",
    SIZES,
    "grad_quantized_strides x_strides grad_x_strides",
    [*_codes("code"), ("commitment_weight", ctypes.c_float), ("rotation", ctypes.c_bool)],
)
CodeKeysParams = _structure("indices keys", "positions num_codes", "")
CodeStatisticsParams = _structure("x indices weights origins keys order offsets partials counts sums", SIZES, "x_strides", _codes("origin"))


def call(function, params: type[ctypes.Structure], types: tuple[Tensor, ...], **fields: object) -> None:
    """Call a launcher, passing tensors as pointers, with their strides if the struct has them."""
    filled = params()
    names = [name for name, _ in params._fields_]
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            setattr(filled, name, value)
            continue
        setattr(filled, name, value.data_ptr() if value.numel() else None)
        if f"{name}_strides" in names:
            setattr(filled, f"{name}_strides", Strides.of(value))
        prefix = {"codebook": "code", "origins": "origin"}.get(name)
        if prefix is not None:
            setattr(filled, f"{prefix}_stride", value.stride(0))
            setattr(filled, f"{prefix}_channel_stride", value.stride(1))
    function(ctypes.byref(filled), *(DTYPES[tensor.dtype] for tensor in types))


def sizes_of(x: Tensor, num_codes: int) -> dict[str, int]:
    return {"outer": x.shape[0], "channels": x.shape[1], "inner": x.shape[2], "num_codes": num_codes}


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


def assert_accurate(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The mean error is at most twice that of plain PyTorch in the same dtype, plus one rounding.

    The largest error is not compared: it is that of the vector most nearly opposite to its code.
    """
    assert actual.shape == exact.shape, name
    assert not actual.isnan().any(), f"{name}: unwritten elements"
    if exact.numel() == 0:
        return
    error, allowed = ((value.double() - exact).abs().mean().item() for value in (actual, plain))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().mean().item()
    assert error <= 2 * allowed + rounding, f"{name}: error {error}, plain PyTorch {allowed}, one rounding {rounding}"


def op_module(name: str):
    return importlib.import_module(f"genperf.ops.{name}")


def cases():
    """(name, x [outer, D, inner], codebook, mask [outer, inner], generator) for all dtypes, layouts and shapes."""
    for number, (pair, layout, shape) in enumerate(itertools.product(PAIRS, LAYOUTS, SHAPES)):
        if pair[0] != torch.float32 and number % 2:
            continue
        outer, channels, inner, num_codes = shape
        generator = torch.Generator().manual_seed(number)
        x = lay_out(torch.randn(outer, channels, inner, generator=generator).to(pair[0]), layout)
        codebook = torch.randn(num_codes, channels, generator=generator).to(pair[1])
        if number % 3 == 0:
            codebook = codebook.T.contiguous().T
        mask = torch.rand(x.shape[0], x.shape[2], generator=generator) > 0.2
        yield f"{pair} {layout} {shape}", x, codebook, mask, generator


def check_quantize(library: ctypes.CDLL) -> None:
    search = op_module("nearest_code").search
    for name, x, codebook, mask, _ in cases():
        indices = search(x, codebook, mask, "euclidean", "reference")
        quantized, mse, valid = nan_like(x), nans(), torch.tensor(-7)
        partials = nans(4096, 2, dtype=torch.float64)
        call(
            library.vector_quantize,
            VectorQuantizeParams,
            (x, codebook),
            x=x,
            codebook=codebook,
            indices=indices,
            quantized=quantized,
            partials=partials,
            mse=mse,
            valid=valid,
            **sizes_of(x, codebook.shape[0]),
        )
        code = codebook[indices.clamp(min=0)].transpose(1, 2)
        kept = mask[:, None]
        assert torch.equal(quantized, torch.where(kept, code.to(x.dtype), 0)), name
        assert valid == mask.sum(), name
        exact = torch.where(kept, x.double() - code.double(), 0).square().sum() / max(1, mask.sum() * x.shape[1])
        assert abs(mse - exact) <= 1e-6 * exact, f"{name}: mse {mse}, exactly {exact}"


def reference_gradient(
    x: Tensor, codebook: Tensor, grad: Tensor | None, grad_loss: Tensor | None, gradient: str, mask: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    quantize = op_module("vector_quantize").vector_quantize_reference
    quantized, indices, loss = quantize(x, codebook, 0.5, 0.25, gradient, "euclidean", mask)
    total = quantized.sum() * 0 if grad is None else (quantized * grad).sum()
    if grad_loss is not None:
        total = total + loss * grad_loss
    return torch.autograd.grad(total, x)[0], indices


def check_backward(library: ctypes.CDLL, rotation: bool) -> None:
    for number, (name, x, codebook, mask, generator) in enumerate(cases()):
        if rotation and x.numel() > 0 and number % 2 == 0:
            # Vectors that are zero or nearly opposite to their code.
            codebook[:-1] = 10
            x.copy_(-0.6 * codebook[-1:, :, None] + 0.1 * torch.randn(x.shape, generator=generator))
            x[0] = 0
        absent = number % 5
        grad = torch.randn(x.shape, generator=generator).to(x.dtype)
        grad = None if absent == 1 else grad if absent == 2 else lay_out(grad, LAYOUTS[1 + number % 3])
        grad_loss = None if absent == 3 else torch.randn((), generator=generator)
        gradient = "rotation" if rotation else "straight_through"

        double = (value if value is None else value.double() for value in (x, codebook, grad, grad_loss))
        exact, indices = reference_gradient(*double, gradient, mask)
        plain, plain_indices = reference_gradient(x, codebook, grad, grad_loss, gradient, mask)
        assert torch.equal(indices, plain_indices), name
        grad_x = nan_like(x)
        pointers = {} if grad is None else {"grad_quantized": grad}
        if grad_loss is not None:
            pointers["grad_mse"] = grad_loss
        call(
            library.vector_quantize_backward,
            VectorQuantizeBackwardParams,
            (x, codebook),
            x=x,
            codebook=codebook,
            indices=indices,
            valid=mask.sum(),
            grad_x=grad_x,
            commitment_weight=0.25,
            rotation=rotation,
            **pointers,
            **sizes_of(x, codebook.shape[0]),
        )
        assert_accurate(f"{name} absent={absent}", grad_x, plain, exact)
        assert (grad_x.transpose(1, 2)[~mask] == 0).all(), f"{name}: gradient at masked positions"


def check_straight_through(library: ctypes.CDLL) -> None:
    check_backward(library, rotation=False)


def check_rotation(library: ctypes.CDLL) -> None:
    check_backward(library, rotation=True)


def run_statistics(
    library: ctypes.CDLL, x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None, origins: Tensor | None
) -> tuple[Tensor, Tensor]:
    key_dtype = torch.int16 if num_codes <= 32767 else torch.int32
    keys = torch.full((indices.numel(),), 99, dtype=key_dtype)
    call(library.code_keys, CodeKeysParams, (), indices=indices, keys=keys, positions=indices.numel(), num_codes=num_codes)
    keys, order = keys.sort(stable=True)
    counts, sums = nans(num_codes), nans(num_codes, x.shape[1])
    partials = nans(-(-indices.numel() // 256), 2, x.shape[1] + 1, dtype=torch.float64)
    optional = {name: value for name, value in (("weights", weights), ("origins", origins)) if value is not None}
    call(
        library.code_statistics,
        CodeStatisticsParams,
        (x, x if origins is None else origins),
        x=x,
        indices=indices,
        keys=keys,
        order=order,
        offsets=torch.full((num_codes + 1,), -99),
        partials=partials,
        counts=counts,
        sums=sums,
        **optional,
        **sizes_of(x, num_codes),
    )
    return counts, sums


def check_statistics(library: ctypes.CDLL) -> None:
    reference = op_module("code_statistics").code_statistics_reference
    for number, (name, x, codebook, mask, generator) in enumerate(cases()):
        num_codes = codebook.shape[0] if number else 40000  # the one case of int32 keys
        origins = codebook if number % 2 and num_codes == codebook.shape[0] else None
        weights = torch.rand(mask.shape, generator=generator) if number % 3 else None
        uniform = torch.rand(mask.shape, generator=generator)
        for skew in ("even", "skewed", "one code"):
            if skew == "one code":
                indices = torch.full(mask.shape, num_codes - 1)
            else:
                indices = ((uniform if skew == "even" else uniform**9) * num_codes).long()
                indices[~mask] = torch.where(uniform[~mask] > 0.5, -1, num_codes)
            counts, sums = run_statistics(library, x, indices, num_codes, weights, origins)
            again = run_statistics(library, x, indices, num_codes, weights, origins)
            assert torch.equal(counts, again[0]), f"{name} {skew}: differs from run to run"
            assert torch.equal(sums, again[1]), f"{name} {skew}: differs from run to run"
            positions = torch.where(indices < num_codes, indices, -1)
            exact = reference(x.double().transpose(1, 2), positions, num_codes, weights, None if origins is None else origins.double())
            for result, expected in zip((counts, sums), exact, strict=True):
                assert not result.isnan().any(), f"{name} {skew}: unwritten elements"
                error = (result.double() - expected).abs()
                bound = 2.0**-24 * expected.abs() + 1e-13 * x.shape[0] * x.shape[2]
                assert (error <= bound).all(), f"{name} {skew}: error {error.max()}"


def check_nan_stays_with_its_code(library: ctypes.CDLL) -> None:
    x = torch.ones(600, 5, 1)
    indices = torch.arange(600)[:, None] % 3
    x[1], x[5] = float("nan"), float("inf")
    indices[5] = -1
    counts, sums = run_statistics(library, x, indices, 4, None, None)
    assert counts.tolist() == [200, 200, 199, 0]
    assert sums[1].isnan().all()
    assert (sums[[0, 2, 3]] == counts[[0, 2, 3], None]).all()


def check_conversions(library: ctypes.CDLL) -> None:
    """The half-precision types of the emulation round like torch's."""
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519.9, 65520.0, 2.0**-25, 3 * 2.0**-25])
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7, 6.1e-5, 3.4e38])
    x = torch.cat([ties, -ties, special, torch.randn(900) * torch.logspace(-9, 6, 900)])
    bfloat16, half, wide = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.float16), nan_like(x)
    library.round_trip(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, bfloat16, half, wide)), x.numel())
    assert torch.equal(bfloat16.view(torch.int16), x.bfloat16().view(torch.int16))
    assert torch.equal(half.view(torch.int16), x.half().view(torch.int16))
    assert torch.equal(wide, x.half().float())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels("quantize_launchers.cpp", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host([HERE / "faults.cpp"], tmp_path_factory.mktemp("faults") / "faults")


CHECKS = [name for name in dir() if name.startswith("check_") and name != "check_backward"]


@pytest.fixture(scope="module")
def outcome(library: Path) -> str:
    return run_in_child(__file__, library, CHECKS)


def test_every_kernel_is_run_on_the_host() -> None:
    run = {kernel for launchers in HERE.glob("*_launchers.cpp") for kernel in kernels(launchers)}
    assert run == set((CSRC / "cuda").glob("*.cu"))


@pytest.mark.parametrize("check", CHECKS)
def test_kernels(outcome: str, check: str) -> None:
    assert f"{check} passed" in outcome, outcome


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("read_past_end", "heap-buffer-overflow"),
        ("divergent_barrier", "reached by only some of the threads"),
        ("divergent_shuffle", "reached by only some of the threads"),
        ("read_unwritten_shared_memory", "NaN from shared memory"),
        ("write_past_shared_memory", "use-after-poison"),
    ],
)
def test_faults_are_reported(faults: Path, fault: str, message: str) -> None:
    result = subprocess.run([faults, fault], capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stderr, result.stderr


def test_no_fault_is_no_report(faults: Path) -> None:
    subprocess.run([faults, "none"], check=True)


if __name__ == "__main__":
    run_checks(globals())
