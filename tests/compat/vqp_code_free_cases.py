"""Options of the classes of vector-quantize-pytorch that have no codebook.

FSQ, FSP, LFQ, EvoLFQ, ResidualFSQ, GroupedResidualFSQ, ResidualLFQ, GroupedResidualLFQ, LatentQuantize, BinaryMapper.
"""

import torch
from vqp_case import Case

CASES: list[Case] = []

# Why an option is missing in genperf, by class and option; a class that is missing has the option "".
UNSUPPORTED: dict[tuple[str, str], str] = {}

# How an option differs from upstream's; with the option "", the class.
DIFFERS: dict[tuple[str, str], str] = {}

# Options that are supported without a kernel; with the option "", the class.
PLAIN: dict[tuple[str, str], str] = {}

SEQUENCE, IMAGE = (2, 12), (3, 4)


def sequence(channels: int) -> tuple[int, ...]:
    return (*SEQUENCE, channels)


def image(channels: int) -> tuple[int, ...]:
    return (2, channels, *IMAGE)


CASES += [
    Case("FSQ", {"levels": [8, 6, 5], "dim": 7, "projection_has_bias": False}, sequence(7)),
    Case("FSQ", {"levels": [8, 6, 5], "dim": 7, "num_codebooks": 2, "keep_num_codebooks_dim": True}, image(7)),
    Case("FSQ", {"levels": [8, 6, 5], "dim": 7, "scale": 2.0, "channel_first": True, "return_indices": False}, (2, 7, 12)),
    Case("FSQ", {"levels": [2, 3, 4], "dim": 5, "preserve_symmetry": True, "noise_dropout": 0.5}, sequence(5)),
    Case("FSQ", {"levels": [5, 5], "dim": 3, "bound_hard_clamp": True, "orthogonal_rotation": True}, sequence(3)),
    Case("FSQ", {"levels": [5, 5], "dim": 3, "allowed_dtypes": (torch.float32,), "force_quantization_f32": False}, sequence(3)),
]
