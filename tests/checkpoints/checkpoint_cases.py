# SPDX-License-Identifier: Apache-2.0
"""The layers, drop-ins and metrics whose checkpoints are tested, and the steps that are run on each.

`write_fixtures.py` runs these cases with genperf at commit 27c15df, and `test_checkpoints.py` with the current genperf. Keywords have
the names of that commit.
"""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import genperf

# Keywords of genperf.nn that are deprecated since.
RENAMED = {"dropout_min_levels", "level_dropout", "num_levels", "revive_below"}


def forward(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def train(module: nn.Module, x: Tensor) -> Any:
    """A step of gradient descent on a weighted sum of the outputs; returns the outputs and the gradient of x."""
    x = x.clone().requires_grad_()
    outputs = module(x)
    sum(output.flatten() @ torch.linspace(0.5, 1, output.numel()) for output in tensors(outputs) if output.requires_grad).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return outputs, x.grad


def train_and_update(module: nn.Module, x: Tensor) -> Any:
    outputs = train(module, x)
    genperf.nn.update_codebooks(module)
    return outputs


class Case(NamedTuple):
    make: str | Callable[[], nn.Module]
    """The path of a class below genperf, or a function without arguments."""
    arguments: tuple = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (never written)
    shape: tuple[int, ...] = (4, 6, 8)
    evaluate: Callable[[nn.Module, Tensor], Any] = forward
    train: Callable[[nn.Module, Tensor], Any] = train
    prepare: Callable[[nn.Module, Tensor], Any] = train
    """A step before the checkpoint."""

    def build(self) -> nn.Module:
        """A new module, with the arguments of that commit."""
        if not isinstance(self.make, str):
            return self.make()
        path, name = f"genperf.{self.make}".rsplit(".", 1)
        return getattr(import_module(path), name)(*self.arguments, **self.options)

    def load(self, state: dict[str, Tensor]) -> nn.Module:
        module = self.build()
        module.load_state_dict(deepcopy(state))  # torchmetrics keeps the tensors themselves
        return module

    @property
    def renamed(self) -> bool:
        """Whether an option has a deprecated name."""
        return isinstance(self.make, str) and self.make.startswith("nn.") and not RENAMED.isdisjoint(self.options)

    def run(self, module: nn.Module, x: Tensor) -> dict[str, Any]:
        """Outputs in evaluation mode, those of one more training step, and the state after it."""
        torch.manual_seed(0)
        module.eval()
        with torch.no_grad():
            evaluated = [output.clone() for output in tensors(self.evaluate(module, x))]
        module.train()
        trained = [output.detach().clone() for output in tensors(self.train(module, x))]
        return {"evaluated": evaluated, "trained": trained, "state_after": state_of(module)}


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of nested outputs, in their order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in tensors(output)] if isinstance(outputs, list | tuple) else []


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def bands(pyramid: nn.Module, images: Tensor) -> Any:
    found = pyramid.decompose(images)
    return found, pyramid.reconstruct(found)


def train_bands(pyramid: nn.Module, images: Tensor) -> Any:
    return bands(pyramid, images)


def with_reference_batch(module: nn.Module, x: Tensor) -> None:
    genperf.nn.set_reference_batch(module, x)


class Player(nn.Module):
    """A linear layer with historical averaging of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.averaging = genperf.losses.HistoricalAveraging(self.linear.parameters())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.averaging()


def train_player(player: Player, x: Tensor) -> Any:
    outputs = train(player, x)
    player.averaging.update()
    return outputs


def reference(dim: int = 4) -> "genperf.metrics.FrechetReference":
    features = torch.arange(12 * dim, dtype=torch.float64).reshape(12, dim)
    return genperf.metrics.FrechetReference.from_features((features * features * 0.37) % 1)


def moments(metric: nn.Module, x: Tensor) -> Any:
    return metric.mean, metric.cov


def take_moments(metric: nn.Module, x: Tensor) -> Any:
    metric.update(x)
    return moments(metric, x)


def scores(metric: nn.Module, x: Tensor) -> Any:
    return metric.compute()


def take_both(metric: nn.Module, x: Tensor) -> None:
    metric.update(x, real=True)
    metric.update(1.5 * x, real=False)


def take_generated(metric: nn.Module, x: Tensor) -> Any:
    metric.update(x, real=False)
    return metric.compute()


def full_score(metric: nn.Module, x: Tensor) -> Any:
    return metric.compute_full()


def take_generated_in_full(metric: nn.Module, x: Tensor) -> Any:
    metric.update(x, real=False)
    return metric.compute_full()


class ChannelMeans(nn.Module):
    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def frechet_inception_distance() -> nn.Module:
    metric = import_module("genperf.compat.torchmetrics").FrechetInceptionDistance(ChannelMeans(), normalize=True)
    metric.persistent(True)
    return metric


IMAGES = (2, 8, 3, 4)
ROWS = (10, 6)
ROWS_OF_4 = (10, 4)
USED = torch.tensor([1, 2, 5, 7, 8, 11])

CASES: dict[str, Case] = {
    "VectorQuantizer": Case("nn.VectorQuantizer", (16, 8)),
    "VectorQuantizer decay": Case("nn.VectorQuantizer", (16, 8), {"decay": 0.9}),
    "VectorQuantizer heads": Case("nn.VectorQuantizer", (16, 8), {"heads": 2, "decay": 0.9}),
    "VectorQuantizer separate heads": Case("nn.VectorQuantizer", (16, 8), {"heads": 2, "separate_codebooks": True, "decay": 0.9}),
    "VectorQuantizer cosine": Case("nn.VectorQuantizer", (16, 8), {"metric": "cosine"}),
    "VectorQuantizer cosine decay": Case("nn.VectorQuantizer", (16, 8), {"metric": "cosine", "decay": 0.9, "gradient": "rotation"}),
    "VectorQuantizer projection": Case("nn.VectorQuantizer", (16, 8), {"code_dim": 4, "heads": 3, "decay": 0.9}),
    "VectorQuantizer images": Case("nn.VectorQuantizer", (16, 8), {"channel_dim": 1}, IMAGES),
    "VectorQuantizer dead codes": Case("nn.VectorQuantizer", (16, 8), {"decay": 0.9, "revive_below": 0.8}),
    "VectorQuantizer dead codes by gradient": Case("nn.VectorQuantizer", (16, 8), {"usage_decay": 0.9, "revive_below": 0.8}),
    "VectorQuantizer kmeans": Case("nn.VectorQuantizer", (16, 8), {"init": "kmeans", "init_iterations": 3, "decay": 0.9}),
    "VectorQuantizer data": Case("nn.VectorQuantizer", (16, 8), {"init": "data", "separate_codebooks": True, "heads": 2}),
    "VectorQuantizer accumulate": Case(
        "nn.VectorQuantizer", (16, 8), {"decay": 0.9, "update": "accumulate"}, train=train_and_update, prepare=train_and_update
    ),
    "VectorQuantizer orthogonal": Case("nn.VectorQuantizer", (16, 8), {"orthogonal_weight": 1.0, "diversity_weight": 0.1}),
    "ResidualVectorQuantizer": Case("nn.ResidualVectorQuantizer", (3, 16, 8)),
    "ResidualVectorQuantizer decay": Case("nn.ResidualVectorQuantizer", (3, 16, 8), {"decay": 0.9}),
    "ResidualVectorQuantizer groups": Case("nn.ResidualVectorQuantizer", (3, 16, 8), {"groups": 2, "decay": 0.9}),
    "ResidualVectorQuantizer shared": Case("nn.ResidualVectorQuantizer", (3, 16, 8), {"shared_codebook": True, "decay": 0.9}),
    "ResidualVectorQuantizer dropout": Case(
        "nn.ResidualVectorQuantizer",
        (),
        {"num_levels": 4, "num_codes": 16, "dim": 8, "level_dropout": True, "dropout_min_levels": 2, "dropout_seed": 3, "decay": 0.9},
    ),
    "ResidualVectorQuantizer dead codes": Case("nn.ResidualVectorQuantizer", (3, 16, 8), {"decay": 0.9, "revive_below": 0.8}),
    "ResidualVectorQuantizer shared dead codes": Case(
        "nn.ResidualVectorQuantizer", (3, 16, 8), {"shared_codebook": True, "groups": 2, "decay": 0.9, "revive_below": 2.0}
    ),
    "ResidualVectorQuantizer projection": Case("nn.ResidualVectorQuantizer", (3, 16, 8), {"code_dim": 3, "groups": 2, "decay": 0.9}),
    "ResidualVectorQuantizer kmeans": Case("nn.ResidualVectorQuantizer", (3, 16, 8), {"init": "kmeans", "metric": "cosine", "decay": 0.9}),
    "FiniteScalarQuantizer": Case("nn.FiniteScalarQuantizer", ([5, 4, 3, 3],), {"num_codebooks": 2}),
    "FiniteScalarQuantizer projection": Case("nn.FiniteScalarQuantizer", ([5, 4, 3], 8), {"symmetric": True}),
    "LookupFreeQuantizer": Case("nn.LookupFreeQuantizer", (4,), {"num_codebooks": 2}),
    "LookupFreeQuantizer projection": Case("nn.LookupFreeQuantizer", (5, 8), {"spherical": True, "inv_temperature": 2.0}),
    "GumbelQuantizer": Case("nn.GumbelQuantizer", (8, 4), {"tau": 0.7}),
    "GumbelQuantizer hard images": Case("nn.GumbelQuantizer", (8, 4), {"hard": True, "channel_dim": 1}, IMAGES),
    "DiagonalGaussian": Case("nn.DiagonalGaussian", (), {"dim": 1}, IMAGES),
    "MinibatchDiscrimination": Case("nn.MinibatchDiscrimination", (6, 4, 3), {}, ROWS),
    "BatchNorm": Case("nn.BatchNorm", (8,), {}, IMAGES),
    "ReferenceBatchNorm": Case("nn.ReferenceBatchNorm", (8,), {}, IMAGES, prepare=with_reference_batch),
    "VirtualBatchNorm": Case("nn.VirtualBatchNorm", (8,), {}, IMAGES, prepare=with_reference_batch),
    "ConditioningAugmentation": Case("nn.ConditioningAugmentation", (6, 4), {}, ROWS),
    "LaplacianPyramid": Case("nn.LaplacianPyramid", (2,), {}, (2, 1, 9, 8), evaluate=bands, train=train_bands, prepare=train_bands),
    "HistoricalAveraging": Case(Player, (), {}, (4, 3), train=train_player, prepare=train_player),
    "FrechetLoss queue": Case(lambda: genperf.losses.FrechetLoss(reference(), queue_size=16), (), {}, ROWS_OF_4),
    "FrechetLoss momentum": Case(lambda: genperf.losses.FrechetLoss(reference(), momentum=0.9), (), {}, ROWS_OF_4),
    "FrechetLoss names": Case(
        lambda: genperf.losses.FrechetLoss({"a": (None, reference()), "b": (None, reference())}, momentum=0.5), (), {}, ROWS_OF_4
    ),
    "FeatureMoments": Case("metrics.FeatureMoments", (), {}, ROWS, evaluate=moments, train=take_moments, prepare=take_moments),
    "FrechetDistance": Case("metrics.FrechetDistance", (), {}, ROWS, evaluate=scores, train=take_generated, prepare=take_both),
    "KernelInceptionDistance": Case(
        "metrics.KernelInceptionDistance",
        (),
        {"subsets": 4, "subset_size": 8},
        ROWS,
        evaluate=full_score,
        train=take_generated_in_full,
        prepare=take_both,
    ),
    "PrecisionRecall": Case("metrics.PrecisionRecall", (), {}, ROWS, evaluate=scores, train=take_generated, prepare=take_both),
    "VectorQuantize": Case("compat.vector_quantize_pytorch.VectorQuantize", (8, 16)),
    "VectorQuantize heads": Case("compat.vector_quantize_pytorch.VectorQuantize", (8, 16), {"heads": 2, "codebook_dim": 4}),
    "VectorQuantize separate heads": Case(
        "compat.vector_quantize_pytorch.VectorQuantize",
        (8, 16),
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "layernorm_after_project_in": True},
    ),
    "VectorQuantize cosine": Case(
        "compat.vector_quantize_pytorch.VectorQuantize", (8, 16), {"use_cosine_sim": True, "kmeans_init": True, "kmeans_iters": 3}
    ),
    "VectorQuantize dead codes": Case(
        "compat.vector_quantize_pytorch.VectorQuantize", (8, 16), {"threshold_ema_dead_code": 2, "rotation_trick": False}
    ),
    "VectorQuantize learnable": Case(
        "compat.vector_quantize_pytorch.VectorQuantize", (8, 16), {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3}
    ),
    "VectorQuantize directional": Case(
        "compat.vector_quantize_pytorch.VectorQuantize", (8, 16), {"directional_reparam": True, "threshold_ema_dead_code": 1}
    ),
    "VectorQuantize losses": Case(
        "compat.vector_quantize_pytorch.VectorQuantize",
        (8, 16),
        {"orthogonal_reg_weight": 1.0, "codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 2.0},
    ),
    "VectorQuantize images": Case("compat.vector_quantize_pytorch.VectorQuantize", (8, 16), {"accept_image_fmap": True}, IMAGES),
    "ResidualVQ": Case("compat.vector_quantize_pytorch.ResidualVQ", (), {"dim": 8, "num_quantizers": 3, "codebook_size": 16}),
    "ResidualVQ shared": Case(
        "compat.vector_quantize_pytorch.ResidualVQ",
        (),
        {"dim": 8, "num_quantizers": 3, "codebook_size": 16, "shared_codebook": True, "threshold_ema_dead_code": 1},
    ),
    "ResidualVQ dropout": Case(
        "compat.vector_quantize_pytorch.ResidualVQ",
        (),
        {"dim": 8, "num_quantizers": 4, "codebook_size": 16, "codebook_dim": 5, "quantize_dropout": True},
    ),
    "ResidualVQ kmeans": Case(
        "compat.vector_quantize_pytorch.ResidualVQ",
        (),
        {"dim": 8, "codebook_size": (16, 8), "kmeans_init": True, "kmeans_iters": 3, "threshold_ema_dead_code": 1},
    ),
    "GroupedResidualVQ": Case(
        "compat.vector_quantize_pytorch.GroupedResidualVQ", (), {"dim": 8, "groups": 2, "num_quantizers": 2, "codebook_size": 16}
    ),
    "SimVQ": Case("compat.vector_quantize_pytorch.SimVQ", (8, 16), {"frozen_codebook_dim": 6}),
    "FSQ": Case("compat.vector_quantize_pytorch.FSQ", ([5, 4, 3],), {"dim": 8, "num_codebooks": 2}),
    "FSQ rotated": Case(
        "compat.vector_quantize_pytorch.FSQ", ([5, 4, 3, 2],), {"dim": 8, "preserve_symmetry": True, "orthogonal_rotation": True}
    ),
    "LFQ": Case("compat.vector_quantize_pytorch.LFQ", (), {"dim": 8, "codebook_size": 16}),
    "LFQ spherical": Case(
        "compat.vector_quantize_pytorch.LFQ",
        (),
        {"dim": 8, "codebook_size": 16, "spherical": True, "cosine_sim_project_in": True, "orthogonal_rotation": True},
    ),
    "taming VectorQuantizer": Case("compat.taming.VectorQuantizer", (16, 8, 0.25), {}, IMAGES),
    "taming VectorQuantizer2": Case(
        "compat.taming.VectorQuantizer2", (16, 8, 0.25), {"remap": USED, "unknown_index": "extra", "legacy": False}, IMAGES
    ),
    "taming GumbelQuantize": Case("compat.taming.GumbelQuantize", (8, 4, 16), {"straight_through": False, "remap": USED}, IMAGES),
    "diffusers VectorQuantizer": Case(
        "compat.diffusers.VectorQuantizer", (16, 8, 0.25), {"remap": USED, "unknown_index": 3, "sane_index_shape": True}, IMAGES
    ),
    "torchmetrics FrechetInceptionDistance": Case(
        frechet_inception_distance, (), {}, (4, 3, 4, 4), evaluate=scores, train=take_generated, prepare=take_both
    ),
}

# Cases that are also saved as whole modules, by torch.save(module).
PICKLED = {
    "VectorQuantizer dead codes": "vector_quantizer.pt",
    "VectorQuantizer projection": "vector_quantizer_projection.pt",
    "VectorQuantizer kmeans": "vector_quantizer_kmeans.pt",
    "ResidualVectorQuantizer groups": "residual_vector_quantizer.pt",
    "ResidualVectorQuantizer dropout": "residual_vector_quantizer_dropout.pt",
    "VectorQuantize": "vector_quantize.pt",
    "VectorQuantize dead codes": "vector_quantize_dead_codes.pt",
    "VectorQuantize directional": "vector_quantize_directional.pt",
    "ResidualVQ shared": "residual_vq.pt",
}
