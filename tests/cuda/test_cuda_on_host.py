# SPDX-License-Identifier: Apache-2.0
"""vector_quantize, residual quantization and code_statistics for CUDA, run on the CPU by cuda_on_host.h; and the faults that it reports."""

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
    assert_each_barrier_is_needed,
    assert_each_kernel_runs,
    compile_kernels,
    compile_on_host,
    fill,
    kernels,
    nan_like,
    nans,
    run_checks,
    run_in_child,
    structure,
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
    "x codebook indices quantized partials ticket loss valid",
    SIZES,
    "x_strides quantized_strides",
    [*_codes("code"), ("weight", ctypes.c_float)],
)
VectorQuantizeBackwardParams = _structure(
    "grad_quantized grad_mse x codebook indices valid grad_x",
    SIZES,
    "grad_quantized_strides x_strides grad_x_strides",
    [*_codes("code"), ("commitment_weight", ctypes.c_float), ("rotation", ctypes.c_bool)],
)
CODEBOOK_STRIDES = "codebook_stride code_stride code_channel_stride"
CodeStatisticsParams = structure(
    ("x indices weights codebooks workspace counts sums grad valid", ctypes.c_void_p),
    ("factor", ctypes.c_float),
    ("outer channels inner num_codes levels", ctypes.c_int64),
    ("x_strides", Strides),
    (CODEBOOK_STRIDES, ctypes.c_int64),
    ("subtract_own residual", ctypes.c_bool),
)
ResidualStepParams = structure(
    ("source residual quantized codebooks found indices mask num_levels next_mask partials ticket mse valid", ctypes.c_void_p),
    ("outer channels inner num_codes levels level", ctypes.c_int64),
    ("source_strides residual_strides quantized_strides", Strides),
    (CODEBOOK_STRIDES, ctypes.c_int64),
)
ResidualBackwardParams = structure(
    ("grad_quantized grad_mse x codebooks indices valid grad_x scratch", ctypes.c_void_p),
    ("outer channels inner num_codes levels", ctypes.c_int64),
    ("grad_quantized_strides x_strides grad_x_strides", Strides),
    (CODEBOOK_STRIDES, ctypes.c_int64),
    ("commitment_weight", ctypes.c_float),
    ("rotation per_quantizer", ctypes.c_bool),
)


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
        if pair[0] != torch.float32 and (number + number // len(SHAPES)) % 2:
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
        quantized, loss, valid = nan_like(x), nans(), torch.tensor(-7)
        partials, ticket = nans(4096, 2, dtype=torch.float64), torch.tensor(0, dtype=torch.int32)
        call(
            library.vector_quantize,
            VectorQuantizeParams,
            (x, codebook),
            x=x,
            codebook=codebook,
            indices=indices,
            quantized=quantized,
            partials=partials,
            ticket=ticket,
            loss=loss,
            valid=valid,
            weight=1.25,
            **sizes_of(x, codebook.shape[0]),
        )
        assert ticket == 0, name
        code = codebook[indices.clamp(min=0)].transpose(1, 2)
        kept = mask[:, None]
        assert torch.equal(quantized, torch.where(kept, code.to(x.dtype), 0)), name
        assert valid == mask.sum(), name
        exact = torch.where(kept, x.double() - code.double(), 0).square().sum() / max(1, mask.sum() * x.shape[1])
        assert abs(loss - 1.25 * exact) <= 1e-6 * 1.25 * exact, f"{name}: loss {loss}, exactly {1.25 * exact}"


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
    counts, sums = nans(num_codes), nans(num_codes, x.shape[1])
    fields = {} if origins is None else {"codebooks": origins[None], "subtract_own": True}
    statistics(library, x, indices=indices, weights=weights, counts=counts, sums=sums, num_codes=num_codes, **fields)
    return counts, sums


def statistics(library: ctypes.CDLL, x: Tensor, codebooks: Tensor | None = None, **fields: object) -> None:
    """Call the launcher with a workspace of random bytes, on which no result may depend."""
    params = fill(CodeStatisticsParams, x=x, codebooks=codebooks, **strides_of(codebooks), **sizes_of(x, 0) | {"levels": 1} | fields)
    library.code_statistics_workspace.restype = ctypes.c_int64
    size = library.code_statistics_workspace(ctypes.byref(params), DTYPES[x.dtype])
    workspace = torch.randint(256, (size,), dtype=torch.uint8)
    params.workspace = workspace.data_ptr()
    code_type = x.dtype if codebooks is None else codebooks.dtype
    library.code_statistics(ctypes.byref(params), DTYPES[x.dtype], DTYPES[code_type])


def strides_of(codebooks: Tensor | None) -> dict[str, int]:
    return {} if codebooks is None else dict(zip(CODEBOOK_STRIDES.split(), codebooks.stride(), strict=True))


def check_statistics(library: ctypes.CDLL) -> None:
    reference = op_module("code_statistics").code_statistics_reference
    for number, (name, x, codebook, mask, generator) in enumerate(cases()):
        # The first sorts by two digits, the second sums a table of digits in several rounds.
        num_codes = {0: 40000, 1: 3000}.get(number, codebook.shape[0])
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
            if skew == "skewed":  # single launches are repeated by the emulation
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


def assert_sums(name: str, found: Tensor, expected: Tensor, summands: int) -> None:
    assert not found.isnan().any(), f"{name}: unwritten elements"
    error = (found.double() - expected).abs()
    assert (error <= 2.0**-24 * expected.abs() + 1e-13 * summands).all(), f"{name}: error {error.max()}"


def check_statistics_of_many_rows(library: ctypes.CDLL) -> None:
    """Each team sums more rows than are staged at a time."""
    x = torch.randn(1, 1, 270_000)
    indices = torch.randint(-1, 4, (1, 270_000))
    indices[:, ::2] = 2
    counts, sums = run_statistics(library, x, indices, 5, None, None)
    for code in range(5):
        chosen = x[0, 0, indices[0] == code].double()
        assert counts[code] == len(chosen)
        assert_sums(f"code {code}", sums[code, 0], chosen.sum(), len(chosen))


def check_codebook_gradient(library: ctypes.CDLL) -> None:
    for pair, layout, (outer, channels, inner, num_codes) in itertools.product(PAIRS, LAYOUTS[:2], [(3, 130, 50, 5), (2, 6, 40, 200)]):
        x = lay_out((torch.randn(outer, channels, inner) + 100).to(pair[0]), layout)
        codebook = (torch.randn(num_codes, channels) + 100).to(pair[1])
        indices = torch.randint(-1, num_codes, (x.shape[0], x.shape[2]))
        gradient, slope, valid = nan_like(codebook), torch.tensor(3.0), (indices >= 0).sum()
        statistics(
            library,
            x,
            codebook[None],
            indices=indices,
            num_codes=num_codes,
            sums=gradient,
            grad=slope,
            valid=valid,
            factor=-0.5,
            subtract_own=True,
        )
        exact = op_module("code_statistics").code_statistics_reference(
            x.double().transpose(1, 2), indices, num_codes, None, codebook.double()
        )[1]
        exact *= 3 * -0.5 / (valid * channels)
        limits = torch.finfo(codebook.dtype)
        bound = (limits.eps + 4 * torch.finfo(torch.float32).eps) * exact.abs() + limits.smallest_normal * limits.eps + 1e-12
        assert ((gradient.double() - exact).abs() <= bound).all(), f"{pair} {layout}"


def residual_cases():
    """(name, x, codebooks [Q, K, D], indices [outer, inner, Q], generator)."""
    sizes = [(3, 9, 40, 7, 1), (2, 33, 37, 60, 4), (2, 8, 50, 5, 9), (3, 700, 1, 4, 3), (1, 170, 5, 4, 2)]
    for number, (dtype, layout, size) in enumerate(itertools.product(DTYPES, LAYOUTS, sizes)):
        if dtype != torch.float32 and (number + number // len(sizes)) % 2:
            continue
        outer, channels, inner, num_codes, levels = size
        generator = torch.Generator().manual_seed(number)
        x = lay_out(torch.randn(outer, channels, inner, generator=generator).to(dtype), layout)
        codebooks = torch.randn(levels, num_codes, channels, generator=generator)
        if number % 3 == 0:
            codebooks = codebooks[:1].expand(levels, -1, -1)
        elif number % 3 == 1:
            codebooks = codebooks.transpose(1, 2).contiguous().transpose(1, 2)
        indices = torch.randint(num_codes, (x.shape[0], x.shape[2], levels), generator=generator)
        run = torch.randint(levels + 1, (x.shape[0], x.shape[2], 1), generator=generator)
        indices = torch.where(torch.arange(levels) < run, indices, -1)
        yield f"{dtype} {layout} {size}", x, codebooks, indices, generator


def levels_of(x: Tensor, codebooks: Tensor) -> dict[str, int]:
    return sizes_of(x, codebooks.shape[1]) | {"levels": codebooks.shape[0]} | strides_of(codebooks)


def residuals_of(x: Tensor, codebooks: Tensor, indices: Tensor) -> list[Tensor]:
    """The residual before every level, and after the last one."""
    found = [x.float()]
    for q, codebook in enumerate(codebooks):
        found.append(found[-1] - op_module("residual_vector_quantize")._code_of(codebook, indices[..., q]))
    return found


def check_residual_statistics(library: ctypes.CDLL) -> None:
    reference = op_module("code_statistics").code_statistics_reference
    for number, (name, x, codebooks, indices, _) in enumerate(residual_cases()):
        levels, num_codes, channels = codebooks.shape
        counts, sums, gradient = nans(levels, num_codes), nans(levels, num_codes, channels), nans(levels, num_codes, channels)
        after = number % 2 == 0
        fields = {"indices": indices, "num_codes": num_codes, "levels": levels, "residual": True}
        statistics(library, x, codebooks, counts=counts, sums=sums, subtract_own=after, **fields)
        slopes, valid = torch.linspace(1, 2, levels), (indices[..., 0] >= 0).sum()
        statistics(library, x, codebooks, sums=gradient, grad=slopes, valid=valid, factor=-1.5, subtract_own=True, **fields)
        for q, residual in enumerate(residuals_of(x, codebooks, indices)[:-1]):
            rows, codes = residual.double().transpose(1, 2), codebooks[q].double()
            expected = reference(rows, indices[..., q], num_codes, None, codes if after else None)
            assert torch.equal(counts[q].double(), expected[0]), name
            assert_sums(name, sums[q], expected[1], indices.numel())
            exact = reference(rows, indices[..., q], num_codes, None, codes)[1] * slopes[q] * -1.5 / (valid * channels).clamp(min=1)
            assert ((gradient[q].double() - exact).abs() <= 6e-7 * exact.abs() + 1e-12).all(), name


def check_residual_steps(library: ctypes.CDLL) -> None:
    for number, (name, x, codebooks, indices, generator) in enumerate(residual_cases()):
        levels = len(codebooks)
        mask = None if number % 2 else torch.rand(x.shape[0], x.shape[2], generator=generator) > 0.2
        number_run = None if number % 3 else torch.tensor(1 + number % levels)
        running = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
        found, quantized, mse, valid = torch.full_like(indices, 99), nan_like(x), nans(levels), torch.tensor(-7)
        residual = nan_like(x, torch.float32)
        ticket, partials = torch.tensor(0, dtype=torch.int32), nans(4096, 2, dtype=torch.float64)
        chosen = torch.where(indices < 0, 0, indices)
        for level in range(levels):
            index = torch.where(running, chosen[..., level], -1)
            source, last = residual if level else x, level == levels - 1
            next_mask = torch.zeros_like(running) if number_run is not None and not last else None
            fields = {} if last else {"residual": residual}
            fields |= {"quantized": quantized} if last else {}
            params = fill(
                ResidualStepParams,
                source=source,
                codebooks=codebooks,
                found=index,
                indices=found,
                mask=mask,
                num_levels=number_run,
                next_mask=next_mask,
                partials=partials,
                ticket=ticket,
                mse=mse,
                valid=valid,
                level=level,
                **levels_of(x, codebooks),
                **fields,
            )
            library.residual_step(ctypes.byref(params), DTYPES[source.dtype], DTYPES[x.dtype])
            if next_mask is not None:
                running = next_mask
        expected = torch.where(torch.arange(levels) < (levels if number_run is None else number_run), chosen, -1)
        expected = expected if mask is None else torch.where(mask.unsqueeze(-1), expected, -1)
        assert torch.equal(found, expected), name
        assert ticket == 0, name
        residuals = residuals_of(x, codebooks, expected)
        if levels > 1:
            assert torch.equal(residual, residuals[-2]), name
        total = op_module("residual_vector_quantize")._code_of(codebooks[0], expected[..., 0])
        for q in range(1, levels):
            total = total + op_module("residual_vector_quantize")._code_of(codebooks[q], expected[..., q])
        assert torch.equal(quantized, total.to(x.dtype)), name
        assert valid == (expected[..., 0] >= 0).sum(), name
        for q in range(levels):
            squares = torch.where(expected[..., q].unsqueeze(1) >= 0, residuals[q + 1].double(), 0).square().sum()
            exact = squares / (valid * x.shape[1]).clamp(min=1)
            assert abs(mse[q] - exact) <= 1e-6 * exact, name


def check_residual_backward(library: ctypes.CDLL) -> None:
    reference = op_module("residual_vector_quantize")._quantize_reference
    for number, (name, x, codebooks, indices, generator) in enumerate(residual_cases()):
        levels = len(codebooks)
        rotation, per_quantizer, absent = number % 4 > 0, number % 4 > 1, number % 5
        grad = None if absent == 1 else lay_out(torch.randn(x.shape, generator=generator).to(x.dtype), LAYOUTS[1 + number % 3])
        grad_mse = None if absent == 3 else torch.randn(levels, generator=generator)

        def gradient(
            dtype: torch.dtype, x=x, codebooks=codebooks, indices=indices, grad=grad, grad_mse=grad_mse, options=(rotation, per_quantizer)
        ) -> Tensor:
            wide = x.to(dtype).requires_grad_()
            quantized, losses = reference(wide, codebooks.to(dtype), indices, 0.5, 0.25, *options)
            total = quantized.sum() * 0 if grad is None else (quantized * grad).sum()
            total = total if grad_mse is None else total + (losses * grad_mse).sum()
            return torch.autograd.grad(total, wide)[0]

        grad_x = nan_like(x)
        params = fill(
            ResidualBackwardParams,
            grad_quantized=grad,
            grad_mse=grad_mse,
            x=x,
            codebooks=codebooks,
            indices=indices,
            valid=(indices[..., 0] >= 0).sum(),
            grad_x=grad_x,
            commitment_weight=0.25,
            rotation=rotation,
            per_quantizer=per_quantizer,
            **levels_of(x, codebooks),
        )
        library.residual_backward_scratch.restype = ctypes.c_int64
        scratch = nans(library.residual_backward_scratch(ctypes.byref(params), DTYPES[x.dtype]) // 4)
        params.scratch = scratch.data_ptr() if scratch.numel() else None
        library.residual_backward(ctypes.byref(params), DTYPES[x.dtype])
        plain = gradient(torch.float32).to(x.dtype)
        assert_accurate(f"{name} {rotation} {per_quantizer} absent={absent}", grad_x, plain, gradient(torch.float64))


# Launches of each launcher: the levels of a residual quantizer are processed in one, after a search for each.
LAUNCHES = {
    ("vector_quantize",): 1,
    ("vector_quantize_backward",): 1,
    ("residual_step",): 1,
    ("residual_backward",): 1,
    ("code_statistics", "channels_last"): 4,
    ("code_statistics", "channels_first"): 5,  # with a transposition
    ("code_statistics", "more codes than counters"): 8,  # two passes of the sort
    ("codebook_gradient", "channels_last"): 4,
    ("residual_statistics", "4 levels"): 4,
    ("residual_statistics", "8 levels"): 6,  # residuals are stored after the fourth level
    ("residual_gradient", "8 levels"): 6,
}


def check_launches(library: ctypes.CDLL) -> None:
    found = {}

    def count(*key: str):
        def counted(function, *args: object, **fields: object) -> None:
            before = library.cuda_on_host_launches()
            function(*args, **fields)
            found[key] = library.cuda_on_host_launches() - before

        return counted

    x, codebook, indices = torch.randn(600, 8, 1), torch.randn(9, 8), torch.randint(-1, 9, (600, 1))
    image, weight = lay_out(x.view(1, 600, 8).transpose(1, 2), "channels_first"), torch.tensor(1.0)
    outputs = {"loss": nans(), "valid": torch.tensor(600), "ticket": torch.tensor(0), "partials": nans(4096, 2, dtype=torch.float64)}
    common = {"x": x, "codebook": codebook, "indices": indices, **sizes_of(x, 9)}
    pair = (x, codebook)
    count("vector_quantize")(call, library.vector_quantize, VectorQuantizeParams, pair, quantized=nan_like(x), **outputs, **common)
    count("vector_quantize_backward")(
        call, library.vector_quantize_backward, VectorQuantizeBackwardParams, pair,
        grad_mse=weight, grad_quantized=x, valid=outputs["valid"], grad_x=nan_like(x), **common,
    )  # fmt: skip
    count("code_statistics", "channels_last")(run_statistics, library, x, indices, 9, None, None)
    count("code_statistics", "channels_first")(run_statistics, library, image, indices.view(1, 600), 9, None, None)
    count("code_statistics", "more codes than counters")(run_statistics, library, x, indices, 24577, None, None)
    gradient = {"grad": torch.ones(8), "valid": outputs["valid"], "factor": 1.0, "subtract_own": True}
    count("codebook_gradient", "channels_last")(
        statistics, library, x, codebook[None], indices=indices, sums=nans(9, 8), num_codes=9, **gradient
    )
    for levels in (4, 8):
        codebooks, chosen = codebook.expand(levels, 9, 8), indices.unsqueeze(-1).expand(-1, -1, levels).contiguous()
        fields = {"indices": chosen, "num_codes": 9, "levels": levels, "residual": True}
        count("residual_statistics", f"{levels} levels")(
            statistics, library, x, codebooks, counts=nans(levels, 9), sums=nans(levels, 9, 8), **fields
        )
    count("residual_gradient", "8 levels")(statistics, library, x, codebooks, sums=nans(8, 9, 8), **fields, **gradient)
    sizes = {"codebooks": codebooks, "indices": chosen, "valid": outputs["valid"], **levels_of(x, codebooks)}
    step = fill(
        ResidualStepParams,
        source=x,
        residual=nan_like(x),
        found=indices,
        mse=nans(8),
        ticket=outputs["ticket"],
        partials=outputs["partials"],
        **sizes,
    )
    count("residual_step")(library.residual_step, ctypes.byref(step), 0, 0)
    backward = fill(ResidualBackwardParams, x=x, grad_quantized=x, grad_x=nan_like(x), rotation=True, per_quantizer=True, **sizes)
    count("residual_backward")(library.residual_backward, ctypes.byref(backward), 0)
    assert found == LAUNCHES


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


def test_each_kernel_runs(outcome: str) -> None:
    assert_each_kernel_runs(outcome)


def test_each_barrier_is_needed(outcome: str) -> None:
    assert_each_barrier_is_needed(outcome)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("read_past_end", "heap-buffer-overflow"),
        ("write_past_shared_memory", "use-after-poison"),
        ("read_unwritten_shared_memory", "a read of shared memory that the block has not written"),
        ("divergent_barrier", "reached by only some of the threads"),
        ("divergent_shuffle", "reached by only some of the threads"),
        ("no_barrier_after_write", "a race with an earlier"),
        ("no_barrier_after_read", "a race with an earlier"),
        ("no_barrier_of_warp", "a race with an earlier"),
        ("no_fence", "atomicInc without an earlier __threadfence()"),
        ("no_ticket", "a race with an earlier"),
        ("half_atomic", "a race with an earlier"),
        ("result_by_order", "the results depend on the order of threads or blocks"),
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
