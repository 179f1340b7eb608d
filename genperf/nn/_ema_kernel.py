# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel for the EMA of a codebook: all steps of an update in one pass over the sums, on the CPU."""

import torch
from torch import Tensor

from ..ops._autograd import transformed
from ..ops._dispatch import Reasons, choose_impl, native_unavailable, register_fake, remembered
from ..ops._precision import accumulator_dtype


def run_kernel(
    codebook: Tensor,  # [..., K, D]
    counts: Tensor,  # [..., K]
    sums: Tensor,  # [..., K, D]
    batch_counts: Tensor,
    batch_sums: Tensor,
    decay: float,
    eps: float,
    *,
    normalize: bool,
    follow: bool,
) -> bool:
    """Update averages and codes in place. False, with nothing written, where the kernel cannot.

    Equivalent to (see `_ema`):
        if follow:
            follow_codes_(codebook, counts, sums, eps, normalize)
        ema_update_(counts, sums, batch_counts, batch_sums, decay)
        codebook_from_ema(counts, sums, eps, out=codebook)
        if normalize:
            codebook.copy_(normalize_codes(codebook))
    """
    if torch.compiler.is_compiling() or transformed():  # Inductor fuses the steps in plain PyTorch
        return False
    dtype = accumulator_dtype(codebook.dtype)
    for t in (counts, sums, batch_counts, batch_sums):
        if t.dtype != dtype or not t.is_contiguous():
            return False
    if not codebook.is_contiguous() or choose_impl("codebook_ema", None, _unavailable(codebook.device, codebook.dtype)) != "native":
        return False
    torch.ops.genperf.codebook_ema(codebook, counts, sums, batch_counts, batch_sums, decay, eps, normalize, follow)
    # The kernel is no op that autograd knows: a graph that has saved the codes must find out that they have changed.
    torch.autograd.graph.increment_version((codebook, counts, sums))
    return True


@remembered
def _unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    native = native_unavailable("codebook_ema", device, dtype) if device.type == "cpu" else "the kernel runs on the CPU only."
    return {"native": native, "reference": None}


@register_fake("codebook_ema")
def _(*arguments: object) -> None:
    pass
