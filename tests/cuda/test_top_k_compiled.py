# SPDX-License-Identifier: Apache-2.0
"""The Triton search of the k nearest codes without a GPU: its kernels compile within the limits of each architecture."""

import pytest
import torch

pytest.importorskip("triton")

from compiled import compile_for
from genperf.kernels.nearest_code import top_k
from mocked_driver import mocked_driver

# By architecture, D and k: the kernels, and the most instructions per score in the loop over the codes. That of `collect` has a loop in it.
CASES = {
    (80, 64, 8): {"threshold": 5.6},
    (90, 256, 64): {"threshold": 5.5, "collect": 12.2, "decide": None},
    (100, 256, 8): {"collect": 11.5},
    (120, 64, 64): {"collect": 16.8},
}


@pytest.mark.parametrize(("arch", "dim", "k"), CASES)
def test_kernels_compile(arch, dim, k):
    with mocked_driver(arch) as driver:
        top_k.nearest_codes(torch.empty(1 << 17, dim, 1), torch.empty(16384, dim), k, False, True)
    sources = {
        source.fn.__name__.removeprefix("nearest_codes_").removesuffix("_kernel"): found for found in driver.sources for source in found[:1]
    }
    for name, limit in CASES[arch, dim, k].items():
        source, options = sources[name]
        compiled = compile_for(arch, source, options)
        sizes = {source.fn.arg_names[i]: value for (i,), value in source.constants.items()}
        print(f"sm_{arch} {name}: {compiled.registers} registers, {compiled.stack} bytes of stack, {compiled.programs} programs at a time")
        assert compiled.stack <= 128  # what is constant over the codes
        assert compiled.programs >= (1 if dim == 256 else 2)
        if limit is not None:
            every, _ = compiled.per_score(sizes["BLOCK_N"], sizes["BLOCK_K"])
            print(f"sm_{arch} {name}: {every:.2f} instructions per score")
            assert every <= limit
            assert not {"LDL", "STL"} & set(compiled.loop)


def test_four_launches():
    """Later calls of a kind launch what the first one compiled."""
    x, codebook = torch.randn(2, 90, 24, 3), torch.randn(2, 40, 24)
    with mocked_driver(90) as driver:
        for _ in range(2):
            driver.launches.clear()
            top_k.nearest_codes(x, codebook, 5, True, False)
            assert len(driver.launches) == len(driver.sources) == 4
