# SPDX-License-Identifier: Apache-2.0
"""FSP of vector-quantize-pytorch in plain PyTorch; the package need not be installed.

The arguments of constructor and forward, the returned values, the state_dict, the methods and the noise of a seed are those of upstream.

Differences from upstream:
  - Indices are exact for any codebook: int32 as upstream, or int64 for more than 2^31 - 1 codes. Upstream sums them in the dtype
    of z, which is wrong beyond 2^24 codes in float32 and 2^8 in bfloat16.
  - Half precision is computed in float32. Upstream does not reach the last of many levels, or under autocast returns an index past it.
  - The slope of act_name="laplace" at 0 is 1/2; upstream's is 0.
  - For fewer than two vectors, which have no variance, norm_loss and the statistics are 0; upstream returns NaN.
  - Invalid arguments raise ValueError instead of AssertionError.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..._typing import signature_of
from ...nn._channels import channels_to, parameter_dtype
from ...ops._autograd import ValueOf
from ...ops._layout import for_inductor
from ...ops._precision import accumulator_dtype
from ...ops._validate import check
from ...ops.finite_scalar_quantize import basis_of, check_levels, numbers_like
from .._placed import Placed

Curve = Callable[[Tensor], Tensor]
CurveName = Literal["tanh", "sigmoid", "normal", "laplace", "cauchy"]
Preset = Literal["none", "var", "kurt", "var_tanh", "var_sigmoid", "var_laplace"]


def _laplace(z: Tensor) -> Tensor:
    # Each half is clamped, so that the other one cannot overflow and the slope at 0 is that of both.
    return torch.where(z < 0, z.clamp(max=0).exp() / 2, 1 - (-z.clamp(min=0)).exp() / 2)


def _inverse_laplace(p: Tensor) -> Tensor:
    return torch.where(p < 0.5, (2 * p.clamp(max=0.5)).log(), -(2 * (1 - p).clamp(max=0.5)).log())


# Cumulative distribution functions and their inverses.
CURVES: dict[CurveName, tuple[Curve, Curve]] = {
    "tanh": (lambda z: (z.tanh() + 1) / 2, lambda p: (2 * p - 1).atanh()),
    "sigmoid": (torch.sigmoid, torch.logit),
    "normal": (lambda z: ((z / math.sqrt(2)).erf() + 1) / 2, lambda p: (2 * p - 1).erfinv() * math.sqrt(2)),
    "laplace": (_laplace, _inverse_laplace),
    "cauchy": (lambda z: z.atan() / math.pi + 0.5, lambda p: ((p - 0.5) * math.pi).tan()),
}


def build_cdf_act(act_name: CurveName) -> tuple[Curve, Curve]:
    """The cumulative distribution function of a name, and its inverse."""
    check("FSP", f"act_name must be one of {[*CURVES]}", act_name, act_name in CURVES)
    return CURVES[act_name]


# The standard deviation of the uniform distribution on [0, 1].
UNIFORM_DEVIATION = math.sqrt(1 / 12)

PRESETS: dict[Preset, dict[str, float]] = {
    "none": {"l1_weight": 0.0, "l2_weight": 0.0, "l3_weight": 0.0, "l4_weight": 0.0},
    "var": {"l3_weight": 0.0, "l4_weight": 0.0},
    "kurt": {},
    "var_tanh": {"l2_target": 0.8225, "l3_weight": 0.0, "l4_weight": 0.0},
    "var_sigmoid": {"l2_target": 3.29, "l3_weight": 0.0, "l4_weight": 0.0},
    "var_laplace": {"l2_target": 2.0, "l3_weight": 0.0, "l4_weight": 0.0},
}


class VectorNorm(nn.Module):
    """A penalty on the distance of the mean, variance, skewness and excess kurtosis of each channel from targets.

    Equivalent to:
        loss = sum(weight * (statistic - target).square().mean() for each statistic [D] of z [N, D])

    Args:
        l1_target, l1_weight: of the mean; l2 of the variance, l3 of the skewness, l4 of the excess kurtosis.
        eps: lower bound of the standard deviation in skewness and kurtosis.
    """

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.l1_target, self.l1_weight = l1_target, l1_weight
        self.l2_target, self.l2_weight = l2_target, l2_weight
        self.l3_target, self.l3_weight = l3_target, l3_weight
        self.l4_target, self.l4_weight = l4_target, l4_weight
        self.eps = eps

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the statistics [D] of vectors z [N, D]."""
        if z.shape[0] < 2:  # not len(z), which torch.export takes for a constant
            zeros = z.new_zeros(z.shape[1])
            return zeros.sum(), dict.fromkeys(("mean", "variance", "skewness", "kurtosis"), zeros)
        variance, mean = torch.var_mean(z, 0)
        scaled = (z - mean) / variance.sqrt().clamp(min=self.eps)
        squares = scaled.square()
        statistics = {
            "mean": mean,
            "variance": variance,
            "skewness": (squares * scaled).mean(0),
            "kurtosis": squares.square().mean(0) - 3,
        }
        targets = ((self.l1_target, self.l1_weight), (self.l2_target, self.l2_weight), (self.l3_target, self.l3_weight))
        targets = (*targets, (self.l4_target, self.l4_weight))
        losses = [(value - target).square().mean() * weight for value, (target, weight) in zip(statistics.values(), targets, strict=True)]
        return torch.stack(losses).sum(), statistics

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @classmethod
    def build(cls, name: Preset) -> "VectorNorm":
        """The penalty of a preset: "none", "var", "kurt", "var_tanh", "var_sigmoid" or "var_laplace"."""
        check("VectorNorm", f"the preset must be one of {[*PRESETS]}", name, name in PRESETS)
        return cls(**PRESETS[name])


class FSP(Placed):
    """Finite scalar perturbation (arXiv 2602.17133): channels are mapped to [0, 1] and quantized, in training by noise of a bin's width.

    Equivalent to (no projection, evaluation mode, without need_inv_act; levels L):
        place = (torch.tanh(z) + 1) / 2
        level_indices = (place * L).floor()
        codes = ((level_indices + 0.5) / L - 0.5) * 12**0.5

    Args:
        levels: number of levels of each channel, at least 2.
        dim: number of channels of z; None for len(levels). If they differ, linear layers project z to the quantized channels and back.
        channel_first: whether z is [B, dim, ...].
        projection_has_bias: whether the linear layers have a bias.
        act_name: the cumulative distribution function that maps channels to [0, 1]: "tanh", "sigmoid", "normal", "laplace" or "cauchy".
        quantize_rate: the share of channels that training quantizes; the others get uniform noise of a bin's width.
        need_inv_act: whether codes are mapped back by the inverse function, or else scaled to a variance of 1.
        vector_norm: the preset of `VectorNorm`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: CurveName = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: Preset = "var_tanh",
    ) -> None:
        super().__init__()
        check("FSP", "quantize_rate must lie in [0, 1]", quantize_rate, 0 <= quantize_rate <= 1)
        build_cdf_act(act_name)
        self._counts = check_levels("FSP", levels)
        self.codebook_size = math.prod(self._counts)
        check("FSP", "the product of levels must be at most 2^63 - 1", self.codebook_size, self.codebook_size < 2**63)
        self.codebook_dim = len(self._counts)
        self.dim = self.codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.has_projections = self.dim != self.codebook_dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.codebook_dim, self.dim, bias=projection_has_bias)
        self.act_name: CurveName = act_name
        self.need_inv_act = need_inv_act
        self.quantize_rate = quantize_rate
        self.vector_norm = VectorNorm.build(vector_norm)

    @property
    def act_func(self) -> Curve:
        return CURVES[self.act_name][0]

    @property
    def inv_act_func(self) -> Curve:
        return CURVES[self.act_name][1]

    def extra_repr(self) -> str:
        return (
            f"levels={self._counts}, codebook_size={self.codebook_size}, dim={self.dim}, act_name={self.act_name!r}, "
            f"need_inv_act={self.need_inv_act}, quantize_rate={self.quantize_rate}"
        )

    def _row(self, numbers: Sequence[int], like: Tensor) -> Tensor:
        """Numbers [len(levels)], one for each channel, in the dtype and on the device of `like`."""
        row = numbers_like(numbers, like)
        return row if isinstance(row, Tensor) else like.new_full((self.codebook_dim,), row)

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The middles of the bins that places [..., len(levels)] in [0, 1] lie in, with a straight-through gradient, and their levels."""
        levels = self._row(self._counts, act_z)
        level_indices = (act_z.detach().clamp(max=1 - eps) * levels).floor().minimum(levels - 1)
        return ValueOf.apply((level_indices + 0.5) / levels, act_z), level_indices

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """The indices [...] of levels [..., len(levels)]."""
        level_indices = level_indices.long()
        indices = (level_indices * self._row(basis_of(self._counts), level_indices)).sum(-1)
        return indices.to(torch.int32) if self.codebook_size < 2**31 else indices

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each channel [..., len(levels)] of indices [...]."""
        levels = zip(self._counts, basis_of(self._counts), strict=True)
        return torch.stack([indices // basis % count for count, basis in levels], -1)

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """The middles of the bins [..., len(levels)] of indices [...], in [0, 1]."""
        places = self.indices_to_level_indices(indices) + 0.5
        return places / self._row(self._counts, places)

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """What `forward` returns in evaluation mode with these indices."""
        codes = self._codes(self.indices_to_act_value(indices), eps)
        codes = self.project_out(codes.to(parameter_dtype(self.project_out) or codes.dtype))
        return for_inductor(channels_to(codes, 1)) if self.channel_first else codes

    def _codes(self, places: Tensor, eps: float) -> Tensor:
        return self.inv_act_func(places.clamp(eps, 1 - eps)) if self.need_inv_act else (places - 0.5) / UNIFORM_DEVIATION

    def forward(self, z: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Quantize z.

        Args:
            z: [..., dim]; [B, dim, ...] with channel_first.
            eps: distance from 0 and 1 that is kept in [0, 1]; None for the eps of z's dtype, at least float32.

        Returns:
            codes, of z's shape; indices, of z's shape without channels; norm_loss, the penalty of `VectorNorm`; and a dict with
            "level_indices" [..., len(levels)], channels last, "norm_info", the statistics, and in training, with quantize_rate < 1,
            "p_accept_prob", the share of noise that stays in [0, 1].
        """
        z = z.movedim(1, -1) if self.channel_first else z
        check("FSP", f"the channels of z must be {self.dim}", list(z.shape), z.shape[-1] == self.dim)
        z = self.project_in(z)
        sizes, dtype = z.shape[:-1], z.dtype
        z = z.reshape(-1, self.codebook_dim).to(accumulator_dtype(dtype))
        eps = eps or torch.finfo(z.dtype).eps
        norm_loss, norm_info = self.vector_norm(z)
        places = self.act_func(z)
        middles, level_indices = self.quantize_act_value(places, eps)
        info: dict[str, Any] = {}
        if self.training and self.quantize_rate < 1:
            half_bins = 1 / (self._row(self._counts, places) * 2)
            noisy = places + half_bins * (torch.rand_like(places) * 2 - 1)
            accepted = (noisy > 0) & (noisy < 1)
            info["p_accept_prob"] = accepted.to(places.dtype).mean()
            noisy = torch.where(accepted, noisy, places)
            middles = torch.where(torch.rand_like(places) > self.quantize_rate, noisy, middles)
        codes = self._codes(middles, eps)
        if self.need_inv_act:
            codes = ValueOf.apply(codes, z)
        codes = self.project_out(codes.to(dtype).reshape(*sizes, self.codebook_dim))
        codes = for_inductor(channels_to(codes, 1)) if self.channel_first else codes
        info = {"level_indices": level_indices.reshape(*sizes, self.codebook_dim), "norm_info": norm_info, **info}
        return codes, self.level_indices_to_indices(level_indices).reshape(sizes), norm_loss, info

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
