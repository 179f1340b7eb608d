# SPDX-License-Identifier: Apache-2.0
"""The CUDA path without a GPU: kernels compile for each architecture within its limits, and CUDA ops trace on fake tensors."""

import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sass import PHILOX, Kernel, disassemble
from torch._subclasses.fake_tensor import FakeTensorMode

import genperf
from genperf import _library
from genperf.ops._layout import as_positions

pytest.importorskip("triton")

from compiled import CUOBJDUMP, compile_for
from genperf.kernels.nearest_code import launch
from mocked_driver import mocked_driver

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100, 120)
CUDA_ARCHS = (80, 90, 100)  # nvcc takes as long for each, and sm_120 has the limits of sm_80
MAX_REGISTERS = 128  # of 65536, so that a multiprocessor holds 512 threads
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


class Case(NamedTuple):
    """A call of the search."""

    dim: int
    codes: int
    x: Callable[[int], torch.Tensor] = lambda dim: torch.empty(1 << 17, dim)
    channel: int = 1
    mask: bool = False


# Every regime: split operands of each depth; queries held, two programs or one on a multiprocessor; streamed queries.
CASES = {
    **{f"rows-{dim}": Case(dim, codes) for dim, codes in ((4, 8192), (8, 262144), (18, 262144), (32, 8192), (64, 512))},
    **{f"rows-{dim}": Case(dim, codes) for dim, codes in ((128, 262144), (256, 16384), (512, 8192), (600, 8192))},
    "images": Case(64, 512, lambda dim: torch.empty(4, dim, 16, 16), mask=True),
    "half": Case(16, 1024, lambda dim: torch.empty(1 << 17, dim, dtype=torch.bfloat16)),
    "few rows": Case(128, 4096, lambda dim: torch.empty(1000, dim)),
}
VARIANTS = (
    *[("scan", case, ARCHS) for case in ("rows-4", "rows-128", "rows-256")],  # the last streams on sm_80 and sm_120
    ("scan", "rows-600", (90, 100)),
    *[("scan", case, (90,)) for case in ("rows-8", "rows-18", "rows-32", "rows-64", "rows-512", "images", "half", "few rows")],
    ("search", "rows-256", ARCHS),
    *[("search", case, (90,)) for case in ("rows-4", "rows-600")],
    *[(kernel, "images", ARCHS) for kernel in ("prepare", "settle")],
    ("prepare", "half", (90,)),
)

# In the loop over the codes, for each score: all instructions of a thread, and those that the pipe of comparisons and integers takes.
# flash-kmeans 0.3.1 takes 8.0 and 5.1 at D = 32, 9.2 and 5.4 at D = 128 and 11.7 and 5.9 at D = 256 on sm_90 (compiled by Triton 3.9).
PER_SCORE = {
    80: {4: (11.3, 4.8), 128: (14, 4.9)},
    90: {
        4: (6, 3), 8: (6.3, 3.1), 16: (6.5, 3.1), 18: (6.5, 3.1), 32: (6.3, 3.1), 64: (6.5, 3.1), 128: (6.8, 3.1),
        256: (10, 4), 512: (23.5, 7.8),
    },
    100: {4: (8, 3.1), 128: (8.3, 3.1), 256: (8.9, 3.6)},
    120: {4: (11.4, 4.8), 128: (14, 4.7)},
}  # fmt: skip
MATRIX_INSTRUCTION = {80: "f16.f16.f32", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "f16.f16.f32"}


@functools.cache
def sources(case: str, arch: int):
    """What a call of the search compiles for an architecture: by kernel, its source as specialized by the launch, and its options."""
    dim, codes, make, channel, mask = CASES[case]
    x = as_positions(make(dim), channel)
    codebook = torch.empty(codes, dim, dtype=x.dtype)
    with mocked_driver(arch) as driver:
        launch.nearest_code(x, codebook, torch.empty(x.shape[0], x.shape[2], dtype=torch.bool) if mask else None, False)
    return {source.fn.__name__.removeprefix("nearest_code_").removesuffix("_kernel"): (source, kept) for source, kept in driver.sources}


@pytest.mark.parametrize(("kernel", "case", "archs"), VARIANTS)
def test_triton_kernels_compile(kernel, case, archs):
    for arch in archs:
        source, options = sources(case, arch)[kernel]
        compiled = compile_for(arch, source, options)
        print(
            f"sm_{arch}: {compiled.registers} registers, {compiled.stack} bytes of stack, {compiled.shared} bytes of shared memory, "
            f"{compiled.programs} programs of {compiled.warps} warps at a time"
        )
        dim = CASES[case].dim
        # What is constant over the codes may lie in memory; check_scan looks at the loop.
        assert compiled.stack <= (256 if kernel == "scan" else 96)
        # Two programs, or one of twice as many rows: some warps multiply while others compare.
        warps = compiled.programs * compiled.warps
        assert warps >= (16 if arch == 90 and dim <= 256 and kernel == "scan" else 8)
        if kernel == "scan":
            assert MATRIX_INSTRUCTION[arch] in compiled.ptx
            assert arch == 80 or "cp.async.bulk.tensor" in compiled.ptx
        if kernel == "scan" and dim in PER_SCORE[arch]:
            check_scan(compiled, arch, dim, source)


def check_scan(compiled, arch, dim, source):
    """The loop over the codes: instructions per score, no stores, and on sm_90 nothing exchanged between threads."""
    sizes = {source.fn.arg_names[i]: value for (i,), value in source.constants.items()}
    every, alu = compiled.per_score(sizes["BLOCK_N"], sizes["BLOCK_K"])
    loads = compiled.loop.count("LDL")
    print(f"sm_{arch}: {every:.2f} instructions per score, {alu:.2f} of them comparisons and integers, {loads} reloads")
    assert every <= PER_SCORE[arch][dim][0]
    assert alu <= PER_SCORE[arch][dim][1]
    assert compiled.loop.count("STL") <= 5
    assert loads <= 30
    assert arch != 90 or "SHFL" not in compiled.loop, "the comparisons exchange values between threads"


LOAD, STORE, DIVISION, EXP = "LDG.E.128", "STG.E.128", "MUFU.RCP", "FFMA.SAT"  # FFMA.SAT begins an exact exponential

# On sm_90, in float32 but for one, by source: part of the kernel's name, elements, landmarks (see sass.py), whether they lie in a loop, and
# the limit of instructions per element. The paths draw noise, and have all gradients; gumbel_sample's have 16 classes per thread, and the
# first is that of a hard sample; finite_scalar_quantize's have 6 channels.
INSTRUCTIONS = {
    "gaussian_sample": [
        ("gaussian_sample_kernelIfLb1", 4, {LOAD: 2, PHILOX: 1, STORE: 1}, True, 84),
        ("gaussian_sample_backward_kernelIfLb1", 4, {LOAD: 3, PHILOX: 1, STORE: 2}, True, 118),
    ],
    "gumbel_sample": [
        ("gumbel_sample_held_kernelIfLb1", 16, {PHILOX: 4}, False, 82),
        ("gumbel_sample_held_kernelIfLb1", 16, {PHILOX: 4, EXP: 1, STORE: 4}, False, 96),
        ("gumbel_sample_backward_held_kernelIfLb1", 16, {PHILOX: 4, EXP: 48, STORE: 4}, False, 126),
    ],
    # Four rows that continue a run, in which every element is converted to double once.
    "code_statistics": [
        ("code_sums_kernelIfLNS_4ModeE0", 16, {LOAD: 4, "F2F.F64.F32": 16}, True, 6),
        ("code_sums_kernelIfLNS_4ModeE1", 16, {LOAD: 4, "F2F.F64.F32": 16}, True, 6),
        ("code_sums_kernelI13__nv_bfloat16LNS_4ModeE0", 32, {LOAD: 4, "F2F.F64.F32": 32}, True, 6.5),
    ],
    "vector_quantize": [
        ("22vector_quantize_kernelIff", 4, {LOAD: 2, STORE: 1}, True, 15),
        ("vector_quantize_backward_kernelIffLb0", 4, {LOAD: 3, STORE: 1}, True, 19),
    ],
    "finite_scalar_quantize": [
        ("finite_scalar_quantize_few_kernelIfLi6ELb1", 6, {DIVISION: 6, "STG": 4}, False, 56),
        ("finite_scalar_quantize_backward_few_kernelIfLi6ELb1", 6, {DIVISION: 6, "STG": 3}, False, 46),
    ],
}


def check_instructions(limits, compiled):
    kernels = disassemble(CUOBJDUMP, compiled, "sm_90") if limits else {}
    for part, elements, landmarks, loop, limit in limits:
        (name,) = (name for name in kernels if part in name)
        count = Kernel(kernels[name]).count(landmarks, loop) / elements
        print(f"sm_90 {count:.1f} instructions per element: {part} through {landmarks}")
        assert count <= limit


@needs_nvcc
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_cuda_kernels_compile_without_spills(source, tmp_path):
    targets = [flag for arch in CUDA_ARCHS for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    kernels = tmp_path / "kernels.fatbin"  # code of the device only
    command = ["nvcc", "-std=c++20", "-O3", *targets, "-Xptxas", "-v", "-I", ROOT / "csrc", "-fatbin", source, "-o", kernels]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(frames) >= len(CUDA_ARCHS), run.stderr
    assert all(frame == ("0", "0", "0") for frame in frames), run.stderr
    used = re.findall(r"entry function '(\w+)' for '(sm_\d+)'.*?Used (\d+) registers", run.stderr, re.DOTALL)
    for name, arch, registers in sorted(used, key=lambda kernel: (kernel[1], -int(kernel[2]))):
        # A multiprocessor has 65,536 registers, allocated to warps in units of 256, and room for 64 warps.
        warps = min(64, 65536 // (-(-int(registers) * 32 // 256) * 256))
        print(f"{arch} {registers:>3} registers, {warps / 64:.0%} of the warps: {name}")
    assert max(int(registers) for *_, registers in used) <= MAX_REGISTERS, run.stderr
    check_instructions(INSTRUCTIONS.get(source.stem, ()), kernels)


def test_cuda_ops_trace_on_fake_tensors():
    """Shapes, dtypes and strides of the CUDA path, without a GPU.

    Autograd then raises or aborts on fake CUDA tensors, so the backward op is called directly as well.
    """
    if _library.cuda_failure is not None:
        pytest.skip(f"no CUDA library: {_library.cuda_failure}")
    autograd = torch.cuda.is_available()
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(2, 8, 5, 7, device="cuda", dtype=dtype, requires_grad=autograd)
            codebook = torch.empty(30, 8, device="cuda", requires_grad=autograd)
            quantized, indices, loss = genperf.vector_quantize(x, codebook, channel_dim=1)
            assert (quantized.shape, quantized.dtype, quantized.device.type) == (x.shape, dtype, "cuda")
            assert quantized.stride() == x.stride()
            assert (indices.shape, indices.dtype) == ((2, 5, 7), torch.int64)
            assert (loss.shape, loss.dtype) == ((), torch.float32)
            counts, sums = genperf.code_statistics(x, indices, 30, channel_dim=1)
            assert (counts.shape, sums.shape) == ((30,), (30, 8))
            assert genperf.nearest_code(x, codebook, channel_dim=1, impl="triton").device.type == "cuda"
            if autograd:
                grads = torch.autograd.grad(quantized.float().sum() + loss, (x, codebook))
                assert [g.shape for g in grads] == [x.shape, codebook.shape]
            flat, valid = x.detach().flatten(2), torch.empty((), dtype=torch.int64, device="cuda")
            found = indices.flatten(1)
            grad = torch.ops.genperf.vector_quantize_backward(flat, loss, flat, codebook, found, valid, 0.25, True)
            assert (grad.shape, grad.dtype, grad.stride()) == (flat.shape, dtype, flat.stride())
            check_like(torch.ops.genperf.vector_quantize_backward_codebook(loss, flat, codebook, found, valid, 1.0), codebook)
            codebooks, losses = torch.empty(3, 30, 8, device="cuda"), torch.empty(3, device="cuda")
            quantized, found, _ = genperf.residual_vector_quantize(flat, codebooks, channel_dim=1)
            check_like(quantized, flat)
            assert (found.shape, found.dtype) == ((2, 35, 3), torch.int64)
            of_codes = torch.ops.genperf.residual_vector_quantize_backward_codebooks(losses, flat, codebooks, found, valid, 1.0)
            check_like(of_codes, codebooks)
            check_like(torch.ops.genperf.residual_code_statistics(flat, codebooks, found, False)[1], codebooks)


def check_like(tensor, x, dtype=None):
    assert (tensor.shape, tensor.dtype, tensor.stride()) == (x.shape, dtype or x.dtype, x.stride())
    assert tensor.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_sampling_and_penalties_trace_on_fake_tensors(dtype):
    if _library.cuda_failure is not None:
        pytest.skip(f"no CUDA library: {_library.cuda_failure}")
    ops = torch.ops.genperf
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 7, device="cuda", dtype=dtype)
        seed = torch.empty((), device="cuda", dtype=torch.int64)
        sample, kl = genperf.gaussian_sample(x, torch.empty_like(x), dtype=torch.float32)
        check_like(sample, x, torch.float32)
        check_like(kl, torch.empty(2))
        for layout in (torch.contiguous_format, torch.channels_last):
            sample, indices, kl = genperf.gumbel_sample(x.to(memory_format=layout), dim=1)
            check_like(sample, x.to(memory_format=layout))
            check_like(indices, torch.empty(2, 5, 7, dtype=torch.int64))
            check_like(kl, torch.empty(2, 5, 7))
        for codes, indices in (genperf.finite_scalar_quantize(x, [5] * 8, channel_dim=1), genperf.lookup_free_quantize(x, channel_dim=1)):
            check_like(codes, x)
            check_like(indices, torch.empty(2, 5, 7, dtype=torch.int64))
        check_like(genperf.interpolate(x, x), x)
        check_like(genperf.gradient_norm_penalty(x), torch.empty(()))
        features = x.flatten(2)
        check_like(genperf.minibatch_similarity(features), torch.empty(2, 8, dtype=dtype))

        grads = [torch.empty_like(features) for _ in range(2)]
        given = (None, None, features, None, features, features)
        assert ops.gaussian_sample_backward(*grads, *given, None, None, None, seed, 0, 0.0) is None
        kl, statistics = torch.empty(2, 35, device="cuda"), torch.empty(4, 2, 35, device="cuda")
        assert ops.gumbel_sample_backward(grads[0], features, kl, features, statistics, None, 1.0, None, seed, 0) is None
        grads = ops.interpolate_backward(features, features, features, None, seed, 0)
        for result, expected in zip(grads, (features, features, torch.empty(2)), strict=True):
            check_like(result, expected)
        penalty, norms = torch.empty((), device="cuda"), torch.empty(2, device="cuda")
        check_like(ops.gradient_norm_penalty_backward(penalty, features, norms, 1.0, False), features)
        check_like(ops.finite_scalar_quantize_backward(features, features, [5] * 8, False, False), features)
        check_like(ops.lookup_free_quantize_backward(features, features, 1.0), features)
        check_like(ops.minibatch_similarity_backward(torch.empty(2, 8, device="cuda", dtype=dtype), features), features)


# CUDA composes code_softmax and sample_code of torch's ops, and its eigenvalues are torch's.
CPU_ONLY = {
    "cluster_distances", "cluster_means", "cluster_sums", "cluster_sums_add", "code_softmax_rows", "code_softmax_rows_backward",
    "codebook_ema", "gaussian_sample_packed", "gaussian_sample_packed_backward", "sample_code_rows", "small_code_softmax",
    "small_code_softmax_backward", "small_lookup_free_entropy", "small_lookup_free_entropy_backward", "small_sample_code",
    "symmetric_eigenvalues",
}  # fmt: skip


def test_every_other_cpu_op_has_a_cuda_kernel():
    if _library.cuda_failure is not None:
        pytest.skip(f"no CUDA library: {_library.cuda_failure}")
    cpu, cuda = (set(torch._C._dispatch_get_registrations_for_dispatch_key(key)) for key in ("CPU", "CUDA"))
    ops = {op.removeprefix("genperf::") for op in cpu - cuda if op.startswith("genperf::")}
    assert ops == CPU_ONLY
