# SPDX-License-Identifier: Apache-2.0
"""Tiles and launch options of the search, chosen by D, K and the architecture.

Regimes, by D alone:
- D <= 21: operands are split in two, x = xh + xl: the columns [xh, xl, xh] . [eh, eh, el] are nearly as accurate as float32. For
  these the comparisons are the limit, which take as long as a depth of 64 on the tensor cores, the columns of D = 21.
- D <= 256 (128 where shared memory or registers are too few): a program holds its queries and passes over the codes.
- 320 < D <= 512 on sm_90: the same with tiles of 32 codes, two of which fit beside the queries. They read 8 bytes
  of the L2 cache for each score of 512 columns, where both operands streaming in tiles of 128 x 128 read 16, and that cache is the
  limit: 0.42 clocks of a multiprocessor for each score, estimated from counts, and 0.68. Up to 320 the rounding up of D to a power of
  two outweighs this.
- otherwise both operands stream through shared memory.

On sm_90 with 128 registers the pass over the codes keeps addresses and bounds in memory: at D = 128 its loop has 15 loads from the
stack and no store, 3 % of its instructions, where 168 registers need none. In return two programs share a multiprocessor.
"""

import torch
import triton

MIN_PROGRAMS = 264  # that a pass is divided for: two for each multiprocessor of an H200
MAX_PROGRAMS = 528  # of a pass; each takes tiles of rows until none is left
SEARCH_PROGRAMS = 264
SEARCH_ROWS = 64
BLOCK_D = 64  # columns loaded at a time if queries stream


class Shape:
    """Tile sizes and launch options of a search over K codes of D dimensions.

    Args:
        dim: D.
        num_codes: K.
        device: a device, or the major number of a compute capability.

    Attributes:
        split_operands: each operand is the sum of two float16 values.
        held: queries are held in registers and shared memory while the codes pass.
        depth: columns of the rounded operands.
        columns: how many of them are multiplied at a time.
        block_n, block_k: queries and codes per tile of scores.
        warps: of a program of the pass.
        tma: codes are loaded through a tensor descriptor.
        major: of the compute capability.
        stages: depth of the software pipeline.
        max_registers: for a thread of a pass.
        tiles: K in tiles, rounded up.
    """

    def __init__(self, dim: int, num_codes: int, device: torch.device | int) -> None:
        major, shared_memory = _architecture(device)
        self.major = major
        self.dim, self.num_codes = dim, num_codes
        self.split_operands = dim <= 21
        wide = major in (9, 10)  # the tensor cores take operands from shared memory
        self.held = dim <= (256 if wide else 128) or (major == 9 and 320 < dim <= 512)
        if self.held:
            self.depth = max(16, triton.next_power_of_2(3 * dim if self.split_operands else dim))
        else:
            self.depth = triton.cdiv(dim, BLOCK_D) * BLOCK_D
        self.block_n, self.block_k, self.warps = 128, 128 if wide else 64, 8
        if major == 9 and self.depth == 256:
            # Two programs do not fit on a multiprocessor: one of twice as many rows, which halves the traffic of the codes.
            self.block_n, self.block_k, self.warps = 256, 64, 16
        if self.held and self.depth == 512:
            self.block_k = 32
        self.tma = major >= 9
        self.columns = self.depth if self.held else BLOCK_D
        self.max_registers = 128 if major == 9 and self.depth <= 256 else 255
        self._shared_memory = shared_memory
        # Two programs share a multiprocessor where they fit: one multiplies while the other compares.
        self.fit(2 if self.depth <= 128 else 1)

    def fit(self, programs: int, most_stages: int = 4) -> None:
        """Set the number of tiles, and as many stages as fit with so many programs on a multiprocessor, for the sizes of tiles."""
        resident = self.block_n * self.columns * 2 if self.held else 0
        stage = (self.block_k + (0 if self.held else self.block_n)) * self.columns * 2
        self.stages = min(max((self._shared_memory // programs - resident - (4 << 10)) // stage, 1), most_stages)
        self.tiles = triton.cdiv(self.num_codes, self.block_k)

    def split(self, rows: int, heads: int) -> tuple[int, int]:
        """Return the number of programs over the codes, and the tiles of codes for each.

        Every program rounds its queries and decides them, which takes as long as `outside` tiles of codes. One program alone is
        assumed to run at 1 / 1.4 of the rate of a multiprocessor that can hold two.
        """
        blocks = triton.cdiv(rows, self.block_n) * heads
        multiprocessors = max(MIN_PROGRAMS // 2, 1)
        least = 1.4 if self.max_registers * 32 * self.warps <= 1 << 15 else 1
        outside = 12 if self.held and self.depth >= 256 else 6

        def cost(splits: int) -> float:
            tiles = triton.cdiv(self.tiles, splits)
            programs = triton.cdiv(blocks * triton.cdiv(self.tiles, tiles), multiprocessors)
            return max(programs, least) * (tiles + outside)

        most = min(self.tiles, triton.cdiv(2 * MIN_PROGRAMS, blocks))
        tiles_per_program = triton.cdiv(self.tiles, min(range(1, most + 1), key=cost))
        return triton.cdiv(self.tiles, tiles_per_program), tiles_per_program

    def prepare_options(self, *, drop_repeated: bool = False) -> dict:
        """`drop_repeated`: codes that equal one of a lower index are never the nearest."""
        return {
            "SPLIT": self.split_operands, "DROP_REPEATED": drop_repeated, "SAMPLE": 64, "BLOCK_K": self.block_k,
            "BLOCK_D": min(self.depth, 32), "num_warps": 8, "enable_fp_fusion": True,
        }  # fmt: skip

    def scan_options(self) -> dict:
        return {
            **self._tile_options(), "BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": self.stages,
            "maxnreg": self.max_registers, "enable_fp_fusion": True,
        }  # fmt: skip

    def settle_options(self) -> dict:
        """Fused multiply-adds are off: they differ from the reference in the last bit."""
        return {"BLOCK_N": 128, "BLOCK_K": self.block_k, "BATCH": 16, "num_warps": 4, "enable_fp_fusion": False}

    def search_options(self) -> dict:
        return {
            **self._tile_options(), "BLOCK_N": SEARCH_ROWS, "SLOTS": 8, "ALL_ROWS": 32, "ALL_CODES": 64, "ALL_DIMS": 16,
            "num_warps": 8, "num_stages": 2, "enable_fp_fusion": False,
        }  # fmt: skip

    def _tile_options(self) -> dict:
        return {
            "SPLIT": self.split_operands, "STREAM": not self.held, "TMA": self.tma, "DEPTH": self.depth if self.held else 1024,
            "BLOCK_K": self.block_k, "BLOCK_D": min(self.depth, BLOCK_D),
        }  # fmt: skip


def _architecture(device: torch.device | int) -> tuple[int, int]:
    """Return the major number of the compute capability and the bytes of shared memory available to a program."""
    if isinstance(device, torch.device) and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.shared_memory_per_block_optin
    major = device if isinstance(device, int) else 8
    return major, {8: 163 << 10, 12: 99 << 10}.get(major, 227 << 10)
