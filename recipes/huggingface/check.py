# SPDX-License-Identifier: Apache-2.0
"""Loads built variants of the kernel in one process and compares their ops with plain PyTorch: python check.py VARIANT ..."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


def load(variant: Path) -> ModuleType:
    """As get_kernel does: from its path, under a name of its own."""
    name = f"kernel_{abs(hash(variant.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check(kernel: ModuleType) -> None:
    for name in kernel.__all__:
        assert hasattr(kernel, name), name
    x, codebook = torch.randn(4, 32, 16, 16, requires_grad=True), torch.randn(256, 32, requires_grad=True)
    flat = x.detach().double().movedim(1, -1).reshape(-1, 32)
    nearest = torch.cdist(flat, codebook.detach().double()).argmin(1).view(4, 16, 16)
    assert torch.equal(kernel.nearest_code(x, codebook, channel_dim=1, impl="native"), nearest)
    compiled = torch.compile(lambda x: kernel.nearest_code(x, codebook, channel_dim=1), fullgraph=True)
    assert torch.equal(compiled(x), nearest)
    quantized, indices, loss = kernel.vector_quantize(x, codebook, channel_dim=1, impl="native")
    (quantized.square().mean() + loss).backward()
    assert torch.equal(indices, nearest)
    moments = torch.randn(8, 6, 4, 4)
    torch.manual_seed(0)
    sample, _ = kernel.gaussian_sample(*moments.chunk(2, 1), impl="native")
    torch.manual_seed(0)
    torch.testing.assert_close(sample, kernel.gaussian_sample(*moments.chunk(2, 1), impl="reference")[0])
    found = kernel.kmeans(flat.float(), 16, iterations=3)
    assert torch.equal(found.indices, kernel.nearest_code(flat.float(), found.codebook))
    cov = torch.randn(32, 64).double()
    cov = cov @ cov.T
    torch.testing.assert_close(kernel.trace_sqrt_product(cov, cov), cov.trace())


def main() -> None:
    kernels = [load(Path(argument)) for argument in sys.argv[1:]]
    for kernel in kernels:
        check(kernel)
    assert "genperf" not in sys.modules
    spaces = {kernel.nearest_code.__globals__["compiled_ops"] for kernel in kernels}
    assert len(spaces) == len(kernels)
    print(f"{len(kernels)} variants agree with plain PyTorch.")


if __name__ == "__main__":
    main()
