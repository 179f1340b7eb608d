"""Tiles and launch options of the search, chosen by D, K and the architecture.

Regimes, by D alone:
- D <= 9: plain bfloat16 would waste the depth of the tensor cores, which is at least 16. So operands are split in two,
  x = xh + xl: the columns [xh, xl, xh] . [eh, eh, el] are nearly as accurate as float32 and, with the bias, fit a depth of 16
  (D <= 4) or 32.
- D <= 128: plain bfloat16. A program reads and rounds its queries once, keeps them and passes over the codes.
- D > 128: a separate kernel rounds the queries, and both operands stream through shared memory.
For D >= 64 the tensor cores are the limit, below that the epilogue: it takes one max per score, and 64 of these per clock and
multiprocessor take as long as a depth of 32 on the tensor cores.

Block size: the B codes of a block share one maximum. For each row, rescoring reads K / B maxima and about 1.5 B D components
of codes, 4 bytes each, so the best B is near sqrt(K / 1.5 D). The cost is flat around it: 8, 32 and 128 are enough.
"""

import torch
import triton

MIN_PROGRAMS = 264  # of a coarse pass: two for each multiprocessor of an H200
BIAS_DEPTH = 16  # columns of the bias if it has an operand of its own
BLOCK_D = 64  # columns loaded at a time if queries stream
CENTER_OPTIONS = {"SAMPLE": 64, "BLOCK_D": 64, "num_warps": 8, "enable_fp_fusion": True}
PREPARE_QUERIES_OPTIONS = {"BLOCK_N": 32, "BLOCK_D": BLOCK_D, "num_warps": 4, "enable_fp_fusion": True}


class Shape:
    """Tile sizes and launch options of a search over K codes of D dimensions.

    Args:
        dim: D.
        num_codes: K.
        device: a device, or the major number of a compute capability.

    Attributes:
        split_operands: each operand is the sum of two bfloat16 values.
        streams: queries stream through shared memory with the codes.
        depth: columns of the rounded operands.
        bias_depth: columns of the bias in an operand of its own, or 0 if it fits among the `depth` columns.
        block_codes: codes that share one maximum.
        block_n, block_k: queries and codes per tile of scores.
        stages: depth of the software pipeline.
        padded: K, rounded up to whole tiles and whole groups of four blocks.
        blocks: blocks in `padded` codes.
    """

    def __init__(self, dim: int, num_codes: int, device: torch.device | int) -> None:
        major, shared_memory = _architecture(device)
        self.dim = dim
        self.split_operands = dim <= 9
        self.streams = dim > 128
        width = (3 * dim if self.split_operands else dim) + 3
        if self.streams:
            self.depth = triton.cdiv(dim, BLOCK_D) * BLOCK_D
        else:
            self.depth = max(16, triton.next_power_of_2(width if self.split_operands else dim))
        self.bias_depth = BIAS_DEPTH if width > self.depth else 0
        self.block_codes = codes_per_block(dim, num_codes)
        self.block_n = 128
        # If queries stream, a tile of 256 codes keeps the traffic within the bandwidth of L2; on other architectures it spills registers.
        self.block_k = 256 if self.streams and major == 9 else 128
        columns = BLOCK_D if self.streams else self.depth
        resident = 0 if self.streams else self.block_n * (columns + self.bias_depth) * 2
        stage = self.block_k * (columns + self.bias_depth) * 2 + (self.block_n * columns * 2 if self.streams else 0)
        self.stages = min(max((shared_memory - resident - (8 << 10)) // stage, 1), 3)
        group = max(self.block_k, 4 * self.block_codes)
        self.padded = triton.cdiv(num_codes, group) * group
        self.blocks = self.padded // self.block_codes

    def split(self, rows: int, heads: int) -> tuple[int, int]:
        """Return the number of programs over the codes, and the tiles of codes for each."""
        tiles = self.padded // self.block_k
        tiles_per_group = max(1, 4 * self.block_codes // self.block_k)
        splits = triton.cdiv(MIN_PROGRAMS, triton.cdiv(rows, self.block_n) * heads)
        tiles_per_program = triton.cdiv(triton.cdiv(tiles, splits), tiles_per_group) * tiles_per_group
        return triton.cdiv(tiles, tiles_per_program), tiles_per_program

    def prepare_codes_options(self) -> dict:
        return {
            "SPLIT": self.split_operands, "BIAS_DEPTH": self.bias_depth, "BLOCK_CODES": self.block_codes,
            "BLOCK_K": 32, "BLOCK_D": min(self.depth, 32), "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip

    def coarse_options(self) -> dict:
        """Options of the coarse kernel, or of the stream kernel if queries stream."""
        options = {
            "BIAS_DEPTH": self.bias_depth, "BLOCK_CODES": self.block_codes, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "num_warps": 8, "num_stages": self.stages, "enable_fp_fusion": True,
        }  # fmt: skip
        if self.streams:
            return {**options, "BLOCK_D": BLOCK_D}
        return {**options, "SPLIT": self.split_operands, "DEPTH": self.depth}

    def rescore_options(self) -> dict:
        """A program is one warp: it waits for memory most of the time, and one warp needs no barriers. A tile has 512 components."""
        tile = 512
        block_d = min(triton.next_power_of_2(self.dim), 32, max(tile // self.block_codes, 4))
        rows = max(tile // (self.block_codes * block_d), 1)
        return {
            "BLOCK_CODES": self.block_codes, "BLOCK_N": rows, "BLOCK_C": min(tile // (4 * rows), 32), "BLOCK_D": block_d, "num_warps": 1,
            "enable_fp_fusion": True,
        }  # fmt: skip

    def float64_options(self) -> dict:
        """Fused multiply-adds are off: they differ from the reference in the last bit."""
        return {"BLOCK_CODES": self.block_codes, "BLOCK_N": 32, "num_warps": 4, "enable_fp_fusion": False}


def _architecture(device: torch.device | int) -> tuple[int, int]:
    """Return the major number of the compute capability and the bytes of shared memory available to a program."""
    if isinstance(device, torch.device) and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.shared_memory_per_block_optin
    major = device if isinstance(device, int) else 9
    return major, 163 << 10 if major == 8 else 227 << 10


def codes_per_block(dim: int, num_codes: int) -> int:
    ratio = num_codes / (1.5 * dim)
    return 8 if ratio < 16**2 else 32 if ratio < 64**2 else 128
