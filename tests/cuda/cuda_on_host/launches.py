# SPDX-License-Identifier: Apache-2.0
"""The kernels that each op starts on CUDA, counted while it runs on the CPU."""

import ctypes

LAUNCHES = {
    "gaussian_sample": 1,
    "gaussian_sample_backward": 1,
    "gumbel_sample": 1,
    "gumbel_sample_backward": 1,
    "interpolate": 1,
    "interpolate_backward": 1,
    "gradient_norm_penalty": 1,
    "gradient_norm_penalty_backward": 1,
    "finite_scalar_quantize": 1,
    "finite_scalar_quantize_backward": 1,
    "lookup_free_quantize": 1,
    "lookup_free_quantize_backward": 1,
    "minibatch_similarity": 1,
    "minibatch_similarity_backward": 1,
}


def run_op(library: ctypes.CDLL, op: str, params: ctypes.Structure, dtype: int, empty: bool = False) -> None:
    """Run an op, and check the number of its launches; with `empty` it may have nothing to do."""
    before = library.cuda_on_host_launches()
    getattr(library, op)(ctypes.byref(params), dtype)
    launches = library.cuda_on_host_launches() - before
    assert launches == LAUNCHES[op] or (empty and launches == 0), f"{op}: {launches} launches instead of {LAUNCHES[op]}"
