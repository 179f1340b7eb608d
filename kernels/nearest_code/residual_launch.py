# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantization on CUDA: three launches, whatever the number of quantizers.

1. prepare.py rounds the codes of all quantizers, as it does for the heads of a search.
2. residual.py takes tiles of rows through all quantizers.
3. The squares that the quantizers leave are summed.
"""

import functools

import torch
import triton
from torch import Tensor

from .decide import SLOTS
from .layout import vector_layout
from .plan import Descriptor, Plan
from .prepare import nearest_code_prepare_kernel, reserve_prepared
from .residual import FLOATS, INTEGERS, residual_finish_kernel, residual_quantize_kernel
from .shape import Shape

_MAX_PLANS = 256


class ResidualShape(Shape):
    """Tile sizes and launch options of residual quantization of `rows` vectors.

    The tiles are such that the loop over the codes reads and writes no spilled values: beside the tiles in shared memory the L1 cache
    is too small for them, and they would take more of the bandwidth of the L2 cache than the codes.

    Attributes:
        programs: at most; as many as the multiprocessors of an H200 hold.
    """

    def __init__(self, dim: int, num_codes: int, device: torch.device | int, rows: int) -> None:
        super().__init__(dim, num_codes, device)
        self.rows = rows
        self.programs, self.max_registers = 264, 255
        self.few_rows = triton.cdiv(rows, 128) < self.programs
        if self.few_rows:
            self.block_n, self.warps = 64, 4
        elif self.major == 9 and self.depth <= 64:
            self.block_n, self.block_k, self.warps = 64, 64, 4
            self.programs, self.max_registers = 528, 128
        elif self.major == 9:
            self.block_n, self.block_k, self.warps = 128, 64, 4
        self.fit(self.programs // 132, most_stages=3)

    @property
    def pays(self) -> bool:
        """Whether one launch takes less time than a search and a launch for each quantizer.

        By the cost model (benchmarks/results/residual_cost.md): what a program does between the codes of two quantizers takes less
        time than the launches that it replaces. For many rows these matter less. The pass of a search over many codes is faster: it has
        fewer instructions, divides the codes among programs if the rows are few, and takes more rows at a time if D is large.
        """
        return self.held and self.num_codes <= 4096 and (self.few_rows or (32 < self.depth <= 128 and self.rows <= 1 << 17))

    def residual_options(self) -> dict:
        """Fused multiply-adds are off for the distances in float64."""
        options = {**self.scan_options(), "CANDIDATES": 32, "ROWS": 32, "CODES": 64, "DIMS": 16, "enable_fp_fusion": False}
        del options["STREAM"]
        return options


def pays(x: Tensor, codebooks: Tensor) -> bool:
    """Whether one launch takes less time than a search and a launch for each quantizer."""
    outer, dim, inner = x.shape
    return inner < 1 << 31 and codebooks.numel() < 1 << 31 and _pays(x.device, outer * inner, dim, codebooks.shape[1])


@functools.lru_cache(maxsize=_MAX_PLANS)
def _pays(device: torch.device, rows: int, dim: int, num_codes: int) -> bool:
    return ResidualShape(dim, num_codes, device, rows).pays


def residual_vector_quantize(
    x: Tensor,  # [outer, D, inner]
    codebooks: Tensor,  # [Q, K, D] float32
    mask: Tensor | None,  # [outer, inner]
    num_quantizers: Tensor | None,  # []
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return quantized, indices [outer, inner, Q], mean squares [Q] of what each quantizer leaves, and the number of rows that count."""
    quantizers = codebooks.shape[0]
    quantized = torch.empty_like(x)
    indices = torch.empty(x.shape[0], x.shape[2], quantizers, dtype=torch.int64, device=x.device)
    mse = torch.empty(quantizers, dtype=torch.float32, device=x.device)
    num_valid = torch.empty((), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return quantized, indices, mse.zero_(), num_valid.zero_()
    mask = None if mask is None else mask.contiguous()
    plan = _plan(
        ResidualShape, x.device, x.dtype, x.shape, x.stride(), quantized.stride(), codebooks.shape, codebooks.stride(),
        mask is not None, num_quantizers is not None, cosine,
    )  # fmt: skip
    plan.run(x, codebooks, mask, num_quantizers, quantized, indices, mse, num_valid)
    return quantized, indices, mse, num_valid


@functools.lru_cache(maxsize=_MAX_PLANS)
def _plan(
    make_shape: type[ResidualShape],
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],  # [outer, D, inner]
    strides: tuple[int, ...],
    strides_out: tuple[int, ...],
    codebook_sizes: tuple[int, ...],  # [Q, K, D]
    codebook_strides: tuple[int, ...],
    has_mask: bool,
    has_limit: bool,
    cosine: bool,
) -> Plan:
    """Buffers, sizes and options of the launches. The dtype is there because the compiled kernel depends on it."""
    outer, dim, inner = sizes
    quantizers, num_codes, _ = codebook_sizes
    positions = outer * inner
    shape = make_shape(dim, num_codes, device, positions)
    shared = quantizers > 1 and codebook_strides[0] == 0
    books = 1 if shared else quantizers
    tiles_of_rows = triton.cdiv(positions, shape.block_n)
    programs = min(tiles_of_rows, shape.programs)

    plan = Plan(device, inputs=("x", "codebook", "mask", "limit", "quantized", "indices", "mse", "num_valid"))
    codes, of_codes = reserve_prepared(plan, shape, books, num_codes)
    plan.buffer("zero", torch.int32, 1)
    plan.buffer("residuals", torch.float32, programs, shape.block_n, dim)
    plan.buffer("queries", torch.float16, programs, shape.block_n, shape.depth)
    plan.buffer("floats", torch.float32, programs, FLOATS.value, shape.block_n)
    plan.buffer("integers", torch.int32, programs, INTEGERS.value, shape.block_n)
    plan.buffer("distances", torch.float64, programs, SLOTS.value, shape.block_n)
    plan.buffer("squares", torch.float64, quantizers, tiles_of_rows)
    plan.buffer("valid", torch.int32, tiles_of_rows)

    stride_outer, stride_d, stride_inner, planar = vector_layout(sizes, strides)
    out_outer, out_d, out_inner, planar_out = vector_layout(sizes, strides_out)
    stride_codebook, stride_k, stride_code_d = codebook_strides
    common = {
        "positions": positions, "inner": inner, "quantizers": quantizers, **of_codes,
        "prepared_step": int(not shared), "tiles_of_rows": tiles_of_rows,
        "stride_outer": stride_outer, "stride_d": stride_d, "stride_inner": stride_inner,
        "stride_out_outer": out_outer, "stride_out_d": out_d, "stride_out_inner": out_inner,
        "stride_codebook": stride_codebook, "stride_k": stride_k, "stride_code_d": stride_code_d,
        "COSINE": cosine, "PLANAR": planar, "PLANAR_OUT": planar_out, "HAS_MASK": has_mask, "HAS_LIMIT": has_limit,
    }  # fmt: skip
    of_codebook = common | {"stride_head": stride_codebook, "stride_d": stride_code_d}
    passed = common | {"codes": Descriptor(codes, (shape.block_k, shape.columns)) if shape.tma else codes}
    plan.launch(nearest_code_prepare_kernel, (shape.tiles, books, 1), of_codebook, shape.prepare_options(drop_repeated=True))
    plan.launch(residual_quantize_kernel, (programs, 1, 1), passed, shape.residual_options())
    plan.launch(
        residual_finish_kernel, (quantizers, 1, 1), common, {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": False}
    )  # fmt: skip
    return plan
