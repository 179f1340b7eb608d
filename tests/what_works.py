# SPDX-License-Identifier: Apache-2.0
"""The table of docs/compatibility.md: what works with every op, layer, loss, metric and drop-in class, and how each is called.

python tests/what_works.py writes the table to the page. tests/test_what_works.py exercises every cell.
"""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import genperf
from genperf import compat, losses, metrics, ops
from genperf import nn as layers
from genperf.compat import diffusers, taming
from genperf.compat import vector_quantize_pytorch as vqp

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
MARKS = "<!-- table -->", "<!-- /table -->"

COLUMNS = ("mixed precision", "checkpointing", "torch.compile", "torch.func", "DDP", "FSDP2", "torch.export", "ONNX")
YES, NA = "yes", "n/a"

BATCH, CODES = 4, 6


@dataclasses.dataclass(frozen=True)
class Row:
    """A name, a module with one input, and the cells of the table that are not "yes"."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    variant: str = ""
    # Under DDP and FSDP2, each rank has the loss of its own batch. Otherwise losses and states are those of the global batch.
    own_batch: bool = False
    # The gradients of the ranks are to be summed, not averaged.
    summed: bool = False
    # The inputs get no gradient.
    data: bool = False
    # Where tests/nn/test_export.py exports the layer to ONNX, its name there.
    onnx: str = ""
    # A mode with gradients, but without updates of averages; evaluation mode by default.
    frozen: Callable[[Any], object] = nn.Module.eval

    @property
    def label(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def cell(self, column: str) -> str:
        if column in self.cells or column not in ("DDP", "FSDP2"):
            return self.cells.get(column, YES)
        return "yes, per rank" if self.own_batch else "yes, loss times ranks" if self.summed else YES


class Function(nn.Module):
    """A function of a batch and parameters as a module."""

    def __init__(self, function: Callable[..., object], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> object:
        return self.function(x, *self.weights)


class Sampler(Function):
    """A function that takes noise as well: None in training mode, a fixed one in evaluation mode."""

    def __init__(self, function: Callable[..., object], noise: Callable[[Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__(function, *shapes)
        self.noise = noise

    def forward(self, x: Tensor) -> object:
        return self.function(x, *self.weights, noise=None if self.training else self.noise(x))


class WithReference(nn.Module):
    """A normalization layer after its reference batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        layers.set_reference_batch(layer, torch.randn(5, 3, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Likeliest(nn.Module):
    """A mapper to codes that takes the likeliest ones, not a sample."""

    def __init__(self, mapper: nn.Module) -> None:
        super().__init__()
        self.mapper = mapper

    def forward(self, x: Tensor) -> object:
        return self.mapper(x, deterministic=True)


class Penalized(nn.Module):
    """A critic and its gradient penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return losses.gradient_penalty(self.critic, x, kind="r1")


class Averaged(nn.Module):
    """A layer with a penalty on the distance from its average over time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    @torch.no_grad()
    def start(self) -> None:
        """Once the parameters are sharded."""
        self.history = losses.HistoricalAveraging(self.linear.parameters())
        self.history.update()
        self.linear.weight.add_(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.history()


def spd(x: Tensor) -> Tensor:
    return x @ x.mT + 0.1 * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)


def frechet_loss() -> nn.Module:
    return losses.FrechetLoss(metrics.FrechetReference.from_features(torch.randn(40, 4)), momentum=0.9)


def positions(x: Tensor) -> Tensor:
    """Indices of codes, one for each vector, the same in each sample."""
    return (torch.arange(x.shape[1], device=x.device) % CODES).expand(x.shape[:-1]).contiguous()


def training_only() -> dict[str, str]:
    """Cells of what no deployed model holds."""
    return dict.fromkeys(("torch.export", "ONNX"), NA)


def freeze(layer: nn.Module) -> None:
    for part in layer.train().modules():
        if hasattr(part, "freeze_codebook"):
            part.freeze_codebook = True


def codes() -> dict[str, str]:
    """Cells of ops that return no gradient."""
    return dict.fromkeys(("checkpointing", "torch.func", "DDP", "FSDP2"), NA)


TRAINING = {"ONNX": NA}
UNUSED = {"DDP": "no: needs `find_unused_parameters=True`"}
READS_VALUES = dict.fromkeys(("torch.compile", "torch.export"), "no: looks at values")


VECTORS, IMAGES, COVARIANCES = (BATCH, 5, 4), (BATCH, 4, 3, 2), (BATCH, 4, 5)

OPS = [
    Row("nearest_code", lambda: Function(genperf.nearest_code, (CODES, 4)), VECTORS, codes()),
    Row("nearest_codes", lambda: Function(lambda x, c: genperf.nearest_codes(x, c, 2), (CODES, 4)), VECTORS, codes()),
    Row("vector_quantize", lambda: Function(genperf.vector_quantize, (CODES, 4)), VECTORS),
    Row("residual_vector_quantize", lambda: Function(genperf.residual_vector_quantize, (2, CODES, 4)), VECTORS),
    Row("code_statistics", lambda: Function(lambda x: genperf.code_statistics(x, positions(x), CODES)), VECTORS, codes() | TRAINING),
    Row(
        "residual_code_statistics",
        lambda: Function(lambda x, c: genperf.residual_code_statistics(x, c, positions(x)[..., None].expand(-1, -1, 2)), (2, CODES, 4)),
        VECTORS,
        codes() | TRAINING,
    ),
    Row(
        "kmeans",
        lambda: Function(lambda x: genperf.kmeans(x, CODES)),
        VECTORS,
        codes() | TRAINING | READS_VALUES,
    ),
    Row("residual_kmeans", lambda: Function(lambda x: genperf.residual_kmeans(x, CODES, 2)), VECTORS, codes() | TRAINING | READS_VALUES),
    Row("code_entropy", lambda: Function(genperf.code_entropy, (CODES, 4)), VECTORS, TRAINING, own_batch=True),
    Row("code_cross_entropy", lambda: Function(lambda x, c: genperf.code_cross_entropy(x, c, positions(x)), (CODES, 4)), VECTORS, TRAINING),
    Row("sample_code", lambda: Function(genperf.sample_code, (CODES, 4)), VECTORS, codes() | TRAINING),
    Row("finite_scalar_quantize", lambda: Function(lambda x: genperf.finite_scalar_quantize(x, (8, 5, 5, 5))), VECTORS),
    Row("finite_scalar_decode", lambda: Function(lambda x: genperf.finite_scalar_decode(positions(x), (8, 5))), VECTORS, codes()),
    Row("lookup_free_quantize", lambda: Function(genperf.lookup_free_quantize), VECTORS),
    Row("lookup_free_decode", lambda: Function(lambda x: genperf.lookup_free_decode(positions(x), 4)), VECTORS, codes()),
    Row(
        "lookup_free_entropy",
        lambda: Function(lambda x: genperf.lookup_free_entropy(x, inv_temperature=1.0)),
        VECTORS,
        TRAINING,
        own_batch=True,
    ),
    Row("gaussian_sample", lambda: Sampler(genperf.gaussian_sample, lambda x: torch.ones_like(x[:, :2])), IMAGES),
    Row("gumbel_sample", lambda: Sampler(genperf.gumbel_sample, torch.zeros_like, (4, 3)), VECTORS),
    Row(
        "interpolate", lambda: Function(lambda x: genperf.interpolate(x, x.flip(1), weight=x.new_full(x.shape[:1], 0.3))), VECTORS, TRAINING
    ),
    Row("perturb", lambda: Function(lambda x: genperf.perturb(x, scale=0.0, weight=x.new_full(x.shape[:1], 0.3))), VECTORS, TRAINING),
    Row("gradient_norm_penalty", lambda: Function(genperf.gradient_norm_penalty), VECTORS, TRAINING),
    Row(
        "minibatch_similarity",
        lambda: Function(lambda x: genperf.minibatch_similarity(x.transpose(0, 1))),
        VECTORS,
        TRAINING,
        own_batch=True,
    ),
    Row(
        "trace_sqrt_product",
        lambda: Function(lambda x: genperf.trace_sqrt_product(spd(x), spd(x.flip(1)))),
        COVARIANCES,
        TRAINING | {"torch.export": "yes, of a fixed size"},
    ),
    Row(
        "frechet_distance",
        lambda: Function(lambda x: genperf.frechet_distance(x[0, 0, :4], spd(x[0]), x[1, 0, :4], spd(x[1]))),
        COVARIANCES,
        TRAINING,
        own_batch=True,
    ),
    Row("matrix_sqrt", lambda: Function(lambda x: genperf.matrix_sqrt(spd(x))), COVARIANCES, TRAINING),
    Row(
        "covariance_factor",
        lambda: Function(lambda x: genperf.covariance_factor(spd(x[0]))),
        COVARIANCES,
        codes() | TRAINING | READS_VALUES,
    ),
]

LAYERS = [
    Row("nn.VectorQuantizer", lambda: layers.VectorQuantizer(CODES, 4), VECTORS, onnx="VectorQuantizer of images"),
    Row(
        "nn.VectorQuantizer",
        lambda: layers.VectorQuantizer(CODES, 4, decay=0.9, channel_dim=1),
        IMAGES,
        variant="EMA",
        onnx="VectorQuantizer",
    ),
    Row("nn.ResidualVectorQuantizer", lambda: layers.ResidualVectorQuantizer(2, CODES, 4), VECTORS, onnx="ResidualVectorQuantizer"),
    Row(
        "nn.ResidualVectorQuantizer",
        lambda: layers.ResidualVectorQuantizer(2, CODES, 4, decay=0.9),
        VECTORS,
        variant="EMA",
        onnx="ResidualVectorQuantizer",
    ),
    Row("nn.FiniteScalarQuantizer", lambda: layers.FiniteScalarQuantizer((5, 5), 4), VECTORS, onnx="FiniteScalarQuantizer"),
    Row(
        "nn.LookupFreeQuantizer",
        lambda: layers.LookupFreeQuantizer(4, channel_dim=1, inv_temperature=1.0),
        IMAGES,
        onnx="LookupFreeQuantizer",
    ),
    Row("nn.IndexBackpropQuantizer", lambda: layers.IndexBackpropQuantizer(CODES, 4, entropy_temperature=1.0), VECTORS),
    Row("nn.GumbelQuantizer", lambda: layers.GumbelQuantizer(4, 3), VECTORS),
    Row("nn.DiagonalGaussian", layers.DiagonalGaussian, IMAGES),
    Row("nn.ConditioningAugmentation", lambda: layers.ConditioningAugmentation(4, 3, deterministic=None), (BATCH, 4)),
    Row("nn.MinibatchDiscrimination", lambda: layers.MinibatchDiscrimination(4, 3, 2), (BATCH, 4), own_batch=True),
    Row("nn.BatchNorm", lambda: layers.BatchNorm(4), IMAGES),
    Row("nn.ReferenceBatchNorm", lambda: WithReference(layers.ReferenceBatchNorm(3)), (BATCH, 3, 2, 4)),
    Row("nn.VirtualBatchNorm", lambda: WithReference(layers.VirtualBatchNorm(3)), (BATCH, 3, 2, 4)),
    Row("nn.LaplacianPyramid", lambda: Function(lambda x: tuple(layers.LaplacianPyramid(1).decompose(x))), (BATCH, 2, 5, 4)),
]

LOSSES = [
    Row("losses.discriminator_loss", lambda: Function(lambda x: losses.discriminator_loss(x, -2 * x)), (BATCH, 4), training_only()),
    Row("losses.generator_loss", lambda: Function(losses.generator_loss), (BATCH, 4), training_only()),
    Row(
        "losses.gradient_penalty",
        Penalized,
        (BATCH, 4),
        {"checkpointing": "yes, with `use_reentrant=False`", "torch.compile": "no: differentiates within the step", **training_only()},
        data=True,
    ),
    Row("losses.feature_matching", lambda: Function(lambda x: losses.feature_matching(x.detach().flip(1), x)), VECTORS, training_only()),
    Row(
        "losses.HistoricalAveraging",
        Averaged,
        (BATCH, 4),
        {"torch.func": "no: holds the parameters themselves", **training_only()},
    ),
    Row(
        "losses.FrechetLoss",
        frechet_loss,
        (BATCH, 4),
        {"torch.compile": "no: breaks the graph in training", **training_only()},
        summed=True,
    ),
    Row(
        "losses.kl_divergence",
        lambda: Function(lambda x: losses.kl_divergence(x.softmax(-1), x.flip(-1).softmax(-1))),
        VECTORS,
        training_only(),
    ),
    Row(
        "losses.js_divergence",
        lambda: Function(lambda x: losses.js_divergence(x.softmax(-1), x.flip(-1).softmax(-1))),
        VECTORS,
        training_only(),
    ),
    Row(
        "losses.wasserstein_1d",
        lambda: Function(lambda x: losses.wasserstein_1d(x.flatten(), x[:, 0].flatten())),
        VECTORS,
        training_only(),
        own_batch=True,
    ),
]

DROP_INS = [
    Row(
        "compat.vector_quantize_pytorch.VectorQuantize",
        lambda: vqp.VectorQuantize(4, CODES),
        VECTORS,
        frozen=freeze,
        onnx="drop-in VectorQuantize",
    ),
    Row(
        "compat.vector_quantize_pytorch.ResidualVQ",
        lambda: vqp.ResidualVQ(dim=4, num_quantizers=2, codebook_size=CODES),
        VECTORS,
        frozen=freeze,
    ),
    Row(
        "compat.vector_quantize_pytorch.GroupedResidualVQ",
        lambda: vqp.GroupedResidualVQ(dim=4, groups=2, num_quantizers=2, codebook_size=CODES),
        VECTORS,
        frozen=freeze,
    ),
    Row(
        "compat.vector_quantize_pytorch.RandomProjectionQuantizer",
        lambda: vqp.RandomProjectionQuantizer(dim=4, codebook_dim=3, codebook_size=CODES),
        VECTORS,
        codes(),
    ),
    Row("compat.vector_quantize_pytorch.SimVQ", lambda: vqp.SimVQ(4, CODES), VECTORS),
    Row(
        "compat.vector_quantize_pytorch.ResidualSimVQ",
        lambda: vqp.ResidualSimVQ(dim=4, num_quantizers=2, codebook_size=CODES),
        VECTORS,
    ),
    Row(
        "compat.vector_quantize_pytorch.HierarchicalVQ",
        lambda: vqp.HierarchicalVQ(dim=4, codebook_size=CODES, scales=(1, 2, 4), kmeans_init=False, accept_image_fmap=True),
        IMAGES,
        frozen=freeze,
    ),
    Row(
        "compat.vector_quantize_pytorch.Sequential",
        lambda: vqp.Sequential(nn.Linear(4, 4), vqp.VectorQuantize(4, CODES)),
        VECTORS,
        frozen=freeze,
    ),
    Row("compat.vector_quantize_pytorch.FSQ", lambda: vqp.FSQ([5, 5], dim=4), VECTORS, onnx="drop-in FSQ"),
    Row("compat.vector_quantize_pytorch.LFQ", lambda: vqp.LFQ(codebook_size=16, dim=4), VECTORS, frozen=freeze, onnx="drop-in LFQ"),
    Row(
        "compat.vector_quantize_pytorch.FSP",
        lambda: vqp.FSP([5, 5], dim=4, quantize_rate=1.0),
        VECTORS,
        {"checkpointing": "yes, with `use_reentrant=False`"},
        own_batch=True,
    ),
    Row("compat.vector_quantize_pytorch.ResidualFSQ", lambda: vqp.ResidualFSQ(levels=[5, 5, 5, 5], num_quantizers=2), VECTORS),
    Row(
        "compat.vector_quantize_pytorch.GroupedResidualFSQ",
        lambda: vqp.GroupedResidualFSQ(dim=4, groups=2, levels=[5, 5], num_quantizers=1),
        VECTORS,
    ),
    Row(
        "compat.vector_quantize_pytorch.ResidualLFQ",
        lambda: vqp.ResidualLFQ(dim=4, codebook_size=8, num_quantizers=2),
        VECTORS,
        frozen=freeze,
    ),
    Row(
        "compat.vector_quantize_pytorch.GroupedResidualLFQ",
        lambda: vqp.GroupedResidualLFQ(dim=4, groups=2, codebook_size=4, num_quantizers=1),
        VECTORS,
        frozen=freeze,
    ),
    Row(
        "compat.vector_quantize_pytorch.EvoLFQ",
        lambda: vqp.EvoLFQ(nn.Linear(4, 3), nn.Linear(3, 4), codebook_size=8),
        VECTORS,
        frozen=freeze,
    ),
    Row("compat.vector_quantize_pytorch.LatentQuantize", lambda: vqp.LatentQuantize([5, 4], 4), IMAGES, UNUSED),
    Row("compat.vector_quantize_pytorch.BinaryMapper", lambda: Likeliest(vqp.BinaryMapper(4)), VECTORS, frozen=freeze),
    Row("compat.taming.VectorQuantizer", lambda: taming.VectorQuantizer(CODES, 4, 0.25), IMAGES, own_batch=True),
    Row("compat.taming.VectorQuantizer2", lambda: taming.VectorQuantizer2(CODES, 4, 0.25), IMAGES),
    Row("compat.taming.GumbelQuantize", lambda: taming.GumbelQuantize(4, 3, CODES), IMAGES, {"ONNX": "no: draws noise"}),
    Row("compat.diffusers.VectorQuantizer", lambda: diffusers.VectorQuantizer(CODES, 4, 0.25), IMAGES),
    Row(
        "compat.diffusers.DiagonalGaussianDistribution",
        lambda: Sampler(
            lambda x, noise: sample_and_kl(diffusers.DiagonalGaussianDistribution(x), noise), lambda x: torch.ones_like(x[:, :2])
        ),
        IMAGES,
    ),
]


def sample_and_kl(distribution: diffusers.DiagonalGaussianDistribution, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    return distribution.sample(noise=noise), distribution.kl()


def metric_cells() -> dict[str, str]:
    return dict.fromkeys(set(COLUMNS) - {"mixed precision", "DDP"}, NA)


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """A metric, which has no gradient and is not a part of a graph."""

    name: str
    make: Callable[[], Any]
    update: Callable[[Any, Tensor, bool], object]
    result: Callable[[Any], tuple[Tensor, ...]]
    cells: dict[str, str] = dataclasses.field(default_factory=metric_cells)

    @property
    def label(self) -> str:
        return self.name

    def cell(self, column: str) -> str:
        return self.cells.get(column, YES)

    def expected(self) -> tuple[Tensor, ...]:
        """The result of one process."""
        metric = self.make()
        for part in ("real", "fake"):
            self.update(metric, measured(part), part == "real")
        return self.result(metric)


def measured(part: str) -> Tensor:
    """Features [N, 4] of real or generated samples, which half precision holds."""
    generator = torch.Generator().manual_seed(len(part) + (part == "real"))
    return torch.randint(-8, 9, (40, 4), generator=generator) / 4 + (part == "real")


MEASURES = [
    MetricRow("metrics.FeatureMoments", metrics.FeatureMoments, lambda m, x, real: m.update(x), lambda m: (m.mean, m.cov)),
    MetricRow("metrics.FrechetDistance", metrics.FrechetDistance, lambda m, x, real: m.update(x, real), lambda m: (m.compute(),)),
    MetricRow(
        "metrics.KernelInceptionDistance",
        metrics.KernelInceptionDistance,
        lambda m, x, real: m.update(x, real),
        lambda m: (m.compute_full(),),
    ),
    MetricRow(
        "metrics.MaximumMeanDiscrepancy",
        metrics.MaximumMeanDiscrepancy,
        lambda m, x, real: m.update(x, real),
        lambda m: (m.compute(),),
    ),
    MetricRow("metrics.PrecisionRecall", metrics.PrecisionRecall, lambda m, x, real: m.update(x, real), lambda m: tuple(m.compute())),
]


@dataclasses.dataclass(frozen=True)
class ElsewhereRow:
    """A class whose tests name what works."""

    name: str
    tests: dict[str, str]  # column -> file::test
    package: str = ""  # without which the class cannot be imported

    @property
    def label(self) -> str:
        return self.name

    def cell(self, column: str) -> str:
        return YES if column in self.tests else NA


ELSEWHERE = [
    ElsewhereRow(
        "compat.torchmetrics.FrechetInceptionDistance",
        {
            "mixed precision": "compat/test_compat_torchmetrics.py::test_half_precision_features",
            "DDP": "compat/test_compat_torchmetrics.py::test_ranks_are_synchronized",
        },
        "torchmetrics",
    ),
    ElsewhereRow(
        "compat.torcheval.FrechetInceptionDistance",
        {
            "mixed precision": "compat/test_compat_torcheval.py::test_half_precision_features",
            "DDP": "compat/test_compat_torcheval.py::test_states_are_merged_copied_and_loaded",
        },
    ),
]

SECTIONS: dict[str, list[Any]] = {
    "Ops": OPS,
    "Layers": LAYERS,
    "Losses": LOSSES,
    "Metrics": MEASURES,
    "Drop-ins": [*DROP_INS, *ELSEWHERE],
}
ROWS: dict[str, Row] = {row.label: row for rows in (OPS, LAYERS, LOSSES, DROP_INS) for row in rows}
METRICS = {row.name: row for row in MEASURES}


def floating(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def total(result: object, x: Tensor) -> Tensor:
    """A scalar that depends on all outputs for a batch x that have a gradient. It is a mean over the samples if losses are."""
    outputs = [t.float() for t in floating(result) if t.requires_grad]
    parts = [t.square().mean() if t.dim() > 1 and len(t) == len(x) else t.mean() for t in outputs]
    return sum(parts[1:], parts[0])


class Network(nn.Module):
    """A linear layer, which is the identity at first, before the module of a row."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Identity() if row.data else nn.Linear(row.shape[-1], row.shape[-1])
        if isinstance(self.first, nn.Linear):
            nn.init.eye_(self.first.weight)
            nn.init.zeros_(self.first.bias)
        self.layer = row.make()

    def start(self) -> "Network":
        """What follows once the parameters are sharded, or else at once."""
        if hasattr(self.layer, "start"):
            self.layer.start()
        return self

    def forward(self, x: Tensor) -> object:
        return self.layer(self.first(x))


def batch(row: Row, seed: int = 1, count: int = 1) -> Tensor:
    """`count` batches of a row's inputs, one after another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count * row.shape[0], *row.shape[1:], generator=generator)


def public_names() -> set[str]:
    """What needs a row: ops, layers, losses, metrics that collect samples, and drop-in classes."""
    names = set(ops.__all__) - {"KMeansProgress", "KMeansResult", "ResidualKMeansResult", "reference_ops", "sample_offset"}
    names |= {f"losses.{name}" for name in losses.__all__ if callable(getattr(losses, name))}
    for package, module in (("nn", layers), ("metrics", metrics)):
        names |= {f"{package}.{name}" for name in module.__all__ if is_module(getattr(module, name))}
    for library in (*compat.__all__, "torcheval", "torchmetrics"):
        try:
            module = getattr(compat, library)
        except ModuleNotFoundError:  # torchmetrics
            continue
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__.startswith(module.__name__) and not name.startswith("_"):
                names.add(f"compat.{library}.{name}")
    return names


def is_module(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def table() -> str:
    blocks = []
    for title, rows in SECTIONS.items():
        lines = [f"| | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
        for row in rows:
            name = f"`{row.name}`" + row.label.removeprefix(row.name)
            lines.append(f"| {name} | {' | '.join(map(row.cell, COLUMNS))} |")
        blocks.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks)


def rendered(page: str) -> str:
    """The page with its table."""
    head, rest = page.split(MARKS[0])
    return f"{head}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
