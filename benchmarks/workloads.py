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

# One of each kind of size, for a run of minutes: torch.compile is compiled anew for each.
QUICK = ("VQ-VAE", "LDM-f8", "LlamaGen-f16", "ViT-VQGAN", "SimVQ", "RQ-VAE-level")
