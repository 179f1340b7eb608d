"""Vector quantisation layer: a codebook learned by gradient or by exponential moving averages."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..metrics._distributed import gather_numbers, gather_rows, sum_over_processes, world_size
from ..ops.code_statistics import code_statistics
from ..ops.nearest_code import METRICS, nearest_code
from ..ops.vector_quantize import GRADIENTS, vector_quantize

INITS = ("uniform", "data")


class VectorQuantizer(nn.Module):
    """Replaces every vector by its nearest code; van den Oord et al., "Neural Discrete Representation Learning" (2017).

    With `decay=None` the codebook is a parameter that learns from the loss. With a `decay` it is a buffer that, in
    training mode, follows moving averages of the vectors assigned to each code (appendix A.1 of the paper):

        counts.lerp_(n, 1 - decay)                                          # n [K], s [K, D]: this batch's
        sums.lerp_(s, 1 - decay)                                            # code_statistics
        smoothed = (counts + eps) / (counts.sum() + K * eps) * counts.sum()
        codebook = sums / smoothed[:, None]

    The output of a step is quantised with the codebook from before its update, and nothing waits for the device.

    Under torch.distributed n and s are summed over all processes, so that their codebooks stay equal and are those of one
    process on the joined batch: in training mode every process must take part in every step. A codebook that learns by
    gradient stays equal by its averaged gradients (DistributedDataParallel).

    Args:
        num_codes: K.
        dim: D, the length of a code and of the channel dimension of x.
        decay: of the moving averages, 0 <= decay < 1; None for a codebook that learns by gradient.
        eps: Laplace smoothing of the counts, positive; only with a decay.
        codebook_weight: weight of the loss term that moves codes to vectors. With a decay that term is left out.
        commitment_weight: weight of the loss term that moves vectors to codes.
        gradient: "straight_through" or "rotation", as in `genperf.vector_quantize`.
        metric: "euclidean" or "cosine", as in `genperf.nearest_code`.
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W].
        init: "uniform" draws codes from (-1/K, 1/K). "data" also does so, and replaces them by random vectors of the
            first training batch (`init_codes`), unless codes were loaded before: then no code starts out of reach.

    Attributes:
        codebook: [K, D]; a parameter, or with a decay a buffer.
        counts, sums: [K] and [K, D], buffers that exist with a decay; they start as ones and as the codebook.

    Raises:
        ValueError: an argument outside its range.
    """

    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float | None = None,
        eps: float = 1e-5,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        gradient: str = "straight_through",
        metric: str = "euclidean",
        channel_dim: int = -1,
        init: str = "uniform",
    ) -> None:
        super().__init__()
        _check("num_codes must be at least 1", num_codes, num_codes >= 1)
        _check("dim must be at least 1", dim, dim >= 1)
        _check("decay must be None or lie in [0, 1)", decay, decay is None or 0 <= decay < 1)
        _check("eps must be positive", eps, eps > 0)
        _check("codebook_weight must not be negative", codebook_weight, codebook_weight >= 0)
        _check("commitment_weight must not be negative", commitment_weight, commitment_weight >= 0)
        _check(f"gradient must be one of {', '.join(GRADIENTS)}", gradient, gradient in GRADIENTS)
        _check(f"metric must be one of {', '.join(METRICS)}", metric, metric in METRICS)
        _check(f"init must be one of {', '.join(INITS)}", init, init in INITS)
        self.num_codes = num_codes
        self.dim = dim
        self.decay = decay
        self.eps = eps
        self.codebook_weight = codebook_weight if decay is None else 0.0
        self.commitment_weight = commitment_weight
        self.gradient = gradient
        self.metric = metric
        self.channel_dim = channel_dim
        # On the host, so that asking costs no synchronisation.
        self._awaits_data = init == "data"

        codebook = torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(num_codes))
            self.register_buffer("sums", codebook.clone())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise x.

        Args:
            x: [..., D, ...], of the codebook's dtype, or half precision with a float32 codebook.
            mask: bool, x's shape without channel_dim; where False a vector is left out: quantized 0, index -1, no part
                in loss, gradients and moving averages.

        Returns:
            quantized, of x's shape and dtype; indices, int64, x's shape without channel_dim; loss, a scalar. See
            `genperf.vector_quantize`.
        """
        if self.training and self._awaits_data:
            self.init_codes(x, mask)
        learns_by_averages = self.training and self.decay is not None
        quantized, indices, loss = vector_quantize(
            x,
            # Backward still needs these codes after the update has written the new ones in place.
            self.codebook.clone() if learns_by_averages else self.codebook,
            codebook_weight=self.codebook_weight,
            commitment_weight=self.commitment_weight,
            gradient=self.gradient,
            metric=self.metric,
            channel_dim=self.channel_dim,
            mask=mask,
        )
        if learns_by_averages:
            self._update_averages(x, indices)
        return quantized, indices, loss

    def encode(self, x: Tensor) -> Tensor:
        """Indices of the nearest codes of x, without loss, gradients or an update of the codebook."""
        return nearest_code(x, self.codebook, metric=self.metric, channel_dim=self.channel_dim)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of `indices` [...], laid out as `forward` lays out `quantized`; zeros where an index is -1.

        Returns:
            [..., D, ...] of the codebook's dtype, differentiable in a learned codebook.

        Raises:
            TypeError: indices that are not int64.
        """
        if indices.dtype != torch.int64:
            raise TypeError(f"VectorQuantizer.decode: indices must be int64, got {indices.dtype}.")
        codes = F.embedding(indices.clamp(min=0), self.codebook)
        codes = torch.where(indices.unsqueeze(-1) >= 0, codes, 0)
        return codes.movedim(-1, self.channel_dim).contiguous()

    @torch.no_grad()
    def init_codes(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes to vectors of x, drawn by torch's default generator; each is drawn once before any is drawn twice.

        `init="data"` does this with the first training batch. Where x has no vector (the mask is False everywhere) the
        codes stay. Under torch.distributed every process must call it; all end with the same codes, drawn from the joined
        batch as process 0 draws.
        """
        vectors = x.detach().movedim(self.channel_dim, -1).reshape(-1, self.dim)
        counts = [vectors.shape[0]]
        if (processes := world_size()) > 1:
            counts = [count for (count,) in gather_numbers(counts, None)]
            mask = mask if mask is None else gather_rows(mask.reshape(-1), counts, None)
        if sum(counts) == 0:
            return
        keys = torch.rand(sum(counts), device=x.device)
        valid = torch.full((), sum(counts), device=x.device)
        if mask is not None:
            keys = keys.masked_fill(~mask.reshape(-1), -1)
            valid = mask.sum()
        order = keys.argsort(descending=True)  # the valid vectors first, shuffled
        drawn = order[torch.arange(self.num_codes, device=x.device) % valid.clamp(min=1)]
        codes = vectors[drawn] if processes == 1 else _vectors_of_all(vectors, counts, drawn)
        codes = torch.where(valid > 0, codes.to(self.codebook.dtype), self.codebook)
        self.codebook.copy_(codes)
        if self.decay is not None:
            self.counts.fill_(1)
            self.sums.copy_(codes)
        self._awaits_data = False

    @torch.no_grad()
    def _update_averages(self, x: Tensor, indices: Tensor) -> None:
        counts, sums = code_statistics(x, indices, self.num_codes, channel_dim=self.channel_dim)
        if world_size() > 1:
            joined = sum_over_processes(torch.cat([counts.unsqueeze(1), sums], 1), None)
            counts, sums = joined[:, 0], joined[:, 1:]
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + self.num_codes * self.eps) * total
        self.codebook.copy_(self.sums / smoothed.unsqueeze(-1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "codebook" in state_dict:
            self._awaits_data = False

    def extra_repr(self) -> str:
        return f"{self.num_codes}, {self.dim}, decay={self.decay}, metric={self.metric!r}, channel_dim={self.channel_dim}"


def _vectors_of_all(vectors: Tensor, counts: list[int], drawn: Tensor) -> Tensor:
    """The vectors [K, D] that process 0 has drawn from those of all processes, numbered in the order of ranks."""
    rank = dist.get_rank()
    drawn = sum_over_processes(drawn if rank == 0 else torch.zeros_like(drawn), None)
    codes = vectors.new_zeros(len(drawn), vectors.shape[1])
    place = drawn - sum(counts[:rank])
    mine = (place >= 0) & (place < len(vectors))
    codes[mine] = vectors[place[mine]]
    return sum_over_processes(codes, None)  # each is of one process and zero on the others


class CodeUsage(NamedTuple):
    """How a set of indices uses a codebook; scalars on the device of the indices."""

    perplexity: Tensor
    """exp of the entropy of the codes' frequencies: the number of codes that, used evenly, would carry as much; 0 without indices."""
    used: Tensor
    """Number of codes that occur."""


def code_usage(indices: Tensor, num_codes: int) -> CodeUsage:
    """Perplexity and number of the codes in use.

    Equivalent to:
        frequency = torch.bincount(indices.flatten(), minlength=num_codes) / indices.numel()
        perplexity, used = torch.special.entr(frequency).sum().exp(), (frequency > 0).sum()

    Args:
        indices: int64 of any shape, -1 ... num_codes - 1; -1 (a masked vector) is left out.
        num_codes: K.

    Returns:
        perplexity, float64; used, int64.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"code_usage: indices must be int64, got {indices.dtype}.")
    if num_codes < 1:
        raise ValueError(f"code_usage: num_codes must be at least 1, got {num_codes}.")
    flat = indices.reshape(-1)
    # Slot 0 takes the masked ones. Not bincount, which waits for the device to size its result.
    counts = torch.zeros(num_codes + 1, dtype=torch.float64, device=indices.device)
    counts = counts.scatter_add(0, flat + 1, counts.new_ones(flat.shape))[1:]
    total = counts.sum()
    entropy = torch.special.entr(counts / total.clamp(min=1)).sum()
    return CodeUsage(torch.where(total > 0, entropy.exp(), 0), (counts > 0).sum())


def _check(rule: str, value: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"VectorQuantizer: {rule}, got {value!r}.")
