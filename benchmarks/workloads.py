# SPDX-License-Identifier: Apache-2.0
"""Sizes that published models train with: vectors per device and step (N), codes (K), dimensions (D)."""

from typing import NamedTuple


class Workload(NamedTuple):
    name: str
    n: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"{self.name}-N{self.n}-K{self.k}-D{self.d}"


WORKLOADS = (
    Workload("VQ-VAE", 16384, 512, 64),
    Workload("VQ-VAE-2-top", 131072, 512, 64),
    Workload("VQGAN-f16", 3072, 1024, 256),
    Workload("LDM-f4", 32768, 8192, 3),
    Workload("LDM-f8", 10240, 16384, 4),
    Workload("LlamaGen-f16", 4096, 16384, 8),
    Workload("TiTok", 4096, 4096, 12),
    Workload("BEST-RQ", 4096, 8192, 16),
    Workload("ViT-VQGAN", 8192, 8192, 32),
    Workload("EnCodec-level", 4800, 1024, 128),
    Workload("DAC-level", 2360, 1024, 8),
    Workload("SimVQ", 4096, 65536, 128),
    Workload("RQ-VAE-level", 4096, 16384, 256),
)

# Further published sizes, for the search alone. A suffix distinguishes variants of a model: the number of codes, or the batch of one GPU
# where eight share the published one. A batch of 32 stands in where the source names none.
SEARCHES = (
    *WORKLOADS,
    Workload("VQ-VAE-2-bottom", 524288, 512, 64),
    Workload("LDM-f8-n256", 10240, 256, 4),
    Workload("LDM-f16", 3584, 16384, 8),
    Workload("rotation-trick-f4", 65536, 8192, 3),
    Workload("rotation-trick-f8", 16384, 16384, 4),
    Workload("ViT-VQGAN-one-GPU", 32768, 8192, 32),
    Workload("LlamaGen-f16-one-GPU", 32768, 16384, 8),
    Workload("RQ-VAE-step", 2048, 16384, 256),
    Workload("IBQ-1k", 1024, 1024, 256),
    Workload("IBQ-8k", 1024, 8192, 256),
    Workload("IBQ-16k", 1024, 16384, 256),
    Workload("IBQ-262k", 1024, 262144, 256),
    Workload("Open-MAGVIT2-16k", 2048, 16384, 14),
    Workload("Open-MAGVIT2-262k", 2048, 262144, 18),
    Workload("SimVQ-1k", 16384, 1024, 128),
    Workload("SimVQ-8k", 16384, 8192, 128),
    Workload("SimVQ-65k", 16384, 65536, 128),
    Workload("SimVQ-262k", 16384, 262144, 128),
    Workload("SimVQ-audio-8k", 1500, 8192, 512),
    Workload("SimVQ-audio-65k", 1500, 65536, 512),
    Workload("TiTok-B", 2048, 4096, 12),
    Workload("TiTok-L", 1024, 4096, 12),
    Workload("TA-TiTok-S", 4096, 8192, 64),
    Workload("TA-TiTok-B", 2048, 8192, 64),
    Workload("TA-TiTok-L", 1024, 8192, 64),
    Workload("VAR-first-scale", 32, 4096, 32),
    Workload("VAR-last-scale", 8192, 4096, 32),
    Workload("Emu3", 131072, 32768, 4),
    Workload("MusicGen-level", 3200, 2048, 128),
    Workload("Mimi-level", 4800, 2048, 256),
    Workload("meshgpt", 5956, 16384, 14),
    Workload("SVG2-head", 75600, 1000, 128),
)

# One of each kind of size, for a run of minutes: torch.compile compiles again for every size.
QUICK = ("VQ-VAE", "LDM-f8", "LlamaGen-f16", "ViT-VQGAN", "SimVQ", "RQ-VAE-level")

# Sizes at which the search on a GPU has goals.
GPU_GOALS = (
    Workload("million", 1 << 20, 1024, 128),
    Workload("large-codebook", 65536, 16384, 256),
    Workload("VQ-VAE-2-bottom", 524288, 512, 64),
    Workload("rotation-trick-f4", 65536, 8192, 3),
    Workload("LlamaGen-f16-one-GPU", 32768, 16384, 8),
    Workload("four-millions", 1 << 22, 1024, 128),
)

# Searches that are timed in turn, with their rivals (--in-turn) or with another build (--compare).
IN_TURN = (
    Workload("RQ-VAE-level", 4096, 16384, 256),
    Workload("VQ-VAE", 16384, 512, 64),
    Workload("ViT-VQGAN", 8192, 8192, 32),
    Workload("VQGAN-f16", 4096, 1024, 256),
    Workload("LlamaGen-f16", 4096, 16384, 8),
    Workload("LDM-f4", 32768, 8192, 4),
)

# Searches of the k nearest codes: beam search, top-k sampling, and the neighbors of precision and recall of features. Size, and k.
NEIGHBORS = (
    (Workload("RQ-VAE-level", 4096, 16384, 256), 8),
    (Workload("EnCodec-level", 4800, 1024, 128), 8),
    (Workload("LlamaGen-f16", 4096, 16384, 8), 64),
    (Workload("features", 10000, 10000, 2048), 5),
)
