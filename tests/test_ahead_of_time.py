"""The GPU side without a GPU: kernels compile for each architecture within its limits, and CUDA ops trace on fake tensors."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genperf
from genperf import _library

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MAX_REGISTERS = 128  # of 65536, so that a multiprocessor holds 512 threads
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def compile_triton(kernel, signature, constants, arch, **options):
    """Compile a Triton kernel for an architecture; its metadata and the assembler's resource report."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    compiled = compile(
        ASTSource(fn=kernel, signature={**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    return compiled


def spilled_bytes(cubin: bytes, path: Path) -> int:
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


QUERY_STRIDES = {"stride_outer": "i64", "stride_d": "i32", "stride_inner": "i32"}


def kernels():
    from genperf.kernels import nearest_code as module

    for dtype in ("fp32", "bf16", "fp16"):
        yield (
            f"prepare-{dtype}", module.nearest_code_prepare_kernel,
            {"codebook": f"*{dtype}", "centre": "*fp32", "values": "*fp32", "bias": "*fp32", "norm": "*fp32", "residual": "*fp32",
             "num_codes": "i32", "dim": "i32", "stride_k": "i32", "stride_d": "i32"},
            {"COSINE": False, "BLOCK_K": 64, "BLOCK_D": 32}, {"enable_fp_fusion": True},
        )  # fmt: skip
        yield (
            f"coarse-{dtype}", module.nearest_code_coarse_kernel,
            {"x": f"*{dtype}", "centre": "*fp32", "values": "*fp32", "bias": "*fp32", "limits": "*fp32", "maxima": "*fp32",
             "bound": "*fp32", "first": "i64", "count": "i32", "inner": "i32", "num_codes": "i32", "blocks": "i32",
             "dim": "i32", **QUERY_STRIDES},
            {"COSINE": False, "TILES": 8, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 32, "BLOCK_CODES": 32},
            module.coarse_options,
        )  # fmt: skip
        yield (
            f"exact-{dtype}", module.nearest_code_exact_kernel,
            {"x": f"*{dtype}", "codebook": f"*{dtype}", "mask": "*i1", "maxima": "*fp32", "bound": "*fp32", "indices": "*i64",
             "first": "i64", "inner": "i32", "num_codes": "i32", "blocks": "i32", "dim": "i32", **QUERY_STRIDES,
             "stride_k": "i32", "stride_code_d": "i32"},
            {"COSINE": False, "HAS_MASK": True, "BLOCK_CODES": 32, "BLOCK_B": 64}, {"num_warps": 1, "enable_fp_fusion": False},
        )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", list(kernels()), ids=lambda case: case[0])
def test_triton_kernels_compile(case, arch, tmp_path):
    name, kernel, signature, constants, options = case
    options = options(arch // 10) if callable(options) else options
    compiled = compile_triton(kernel, signature, constants, arch, **options)
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    assert spilled_bytes(compiled.asm["cubin"], tmp_path / "kernel.cubin") == 0
    if name.startswith("coarse"):
        assert "tf32" in compiled.asm["ptx"]


@needs_nvcc
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_cuda_kernels_compile_without_spills(source, tmp_path):
    targets = [flag for arch in ARCHS for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    command = ["nvcc", "-std=c++20", "-O3", *targets, "-Xptxas", "-v", "-I", ROOT / "csrc", "-c", source, "-o", tmp_path / "kernel.o"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(frames) >= len(ARCHS), run.stderr
    assert all(frame == ("0", "0", "0") for frame in frames), run.stderr
    kernels = re.findall(r"entry function '(\w+)' for '(sm_\d+)'.*?Used (\d+) registers", run.stderr, re.DOTALL)
    for name, arch, registers in sorted(kernels, key=lambda kernel: (kernel[1], -int(kernel[2]))):
        # A multiprocessor has 65,536 registers, given to warps in pieces of 256, and room for 64 warps.
        warps = min(64, 65536 // (-(-int(registers) * 32 // 256) * 256))
        print(f"{arch} {registers:>3} registers, {warps / 64:.0%} of the warps: {name}")
    assert max(int(registers) for *_, registers in kernels) <= MAX_REGISTERS, run.stderr


def test_cuda_ops_trace_on_fake_tensors():
    """Shapes, dtypes and strides of the CUDA path on a machine that has no GPU.

    Without one autograd refuses or aborts on fake CUDA tensors, so the backward op is called by itself too.
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
            grad = torch.ops.genperf.vector_quantize_backward(flat, loss, flat, codebook, indices.flatten(1), valid, 0.25, True)
            assert (grad.shape, grad.dtype, grad.stride()) == (flat.shape, dtype, flat.stride())


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
        check_like(genperf.interpolate(x, x), x)
        check_like(genperf.gradient_norm_penalty(x), torch.empty(()))
        features = x.flatten(2)
        check_like(genperf.minibatch_similarity(features), torch.empty(2, 8, dtype=dtype))

        grads = [torch.empty_like(features) for _ in range(2)]
        given = (None, None, features, None, features, features)
        assert ops.gaussian_sample_backward(*grads, *given, None, None, None, seed, 0.0) is None
        kl, statistics = torch.empty(2, 35, device="cuda"), torch.empty(4, 2, 35, device="cuda")
        assert ops.gumbel_sample_backward(grads[0], features, kl, features, statistics, None, 1.0, None, seed) is None
        grads = ops.interpolate_backward(features, features, features, None, seed)
        for result, expected in zip(grads, (features, features, torch.empty(2)), strict=True):
            check_like(result, expected)
        penalty, norms = torch.empty((), device="cuda"), torch.empty(2, device="cuda")
        check_like(ops.gradient_norm_penalty_backward(penalty, features, norms, 1.0, False), features)
        check_like(ops.minibatch_similarity_backward(torch.empty(2, 8, device="cuda", dtype=dtype), features), features)


CUDA_OPS = [
    "nearest_code",
    "vector_quantize",
    "vector_quantize_backward",
    "code_statistics",
    "gaussian_sample",
    "gaussian_sample_backward",
    "gumbel_sample",
    "gumbel_sample_backward",
    "interpolate",
    "interpolate_backward",
    "gradient_norm_penalty",
    "gradient_norm_penalty_backward",
    "minibatch_similarity",
    "minibatch_similarity_backward",
]


def test_cuda_kernels_are_registered():
    if _library.cuda_failure is not None:
        pytest.skip(f"no CUDA library: {_library.cuda_failure}")
    for op in CUDA_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"genperf::{op}", "CUDA"), op
