# SPDX-License-Identifier: Apache-2.0
"""The types that a type checker shows in a project that uses genperf."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import genperf
from genperf import losses, metrics, models

pytest.importorskip("basedpyright")

PREAMBLE = """\
import torch
import genperf
from genperf import losses, metrics, models, nn
from genperf.compat import diffusers, taming, vector_quantize_pytorch
from torch.nn import Linear

x, linear = torch.ones(2, 4), Linear(4, 4)
"""

THREE_TENSORS = "tuple[Tensor, Tensor, Tensor]"

LAYERS = {
    "nn.BatchNorm(4)": "Tensor",
    "nn.ConditioningAugmentation(4, 2)": "tuple[Tensor, Tensor]",
    "nn.DiagonalGaussian()": "tuple[Tensor, Tensor]",
    "nn.FiniteScalarQuantizer([8, 5, 5, 5])": "tuple[Tensor, Tensor]",
    "nn.GumbelQuantizer(4, 2)": THREE_TENSORS,
    "nn.IndexBackpropQuantizer(8, 4)": THREE_TENSORS,
    "nn.LookupFreeQuantizer(4)": THREE_TENSORS,
    "nn.MinibatchDiscrimination(4, 3, 2)": "Tensor",
    "nn.ReferenceBatchNorm(4)": "Tensor",
    "nn.ResidualVectorQuantizer(2, 8, 4)": THREE_TENSORS,
    "nn.VectorQuantizer(8, 4)": THREE_TENSORS,
    "nn.VirtualBatchNorm(4)": "Tensor",
}
OTHER_MODULES = {
    "losses.FrechetLoss(metrics.FrechetReference.load('reference.npz'))": "Tensor",
    "models.Autoencoder()": "Tensor",
    "models.VAE()": "tuple[Tensor, Tensor]",
    "models.VQVAE()": "VQVAEOutput",
    "models.VQVAE2()": "VQVAE2Output",
    "diffusers.VectorQuantizer(8, 4, 0.25)": "tuple[Tensor, Tensor, tuple[Tensor | None, None, Tensor]]",
    "taming.VectorQuantizer2(8, 4, 0.25)": "tuple[Tensor, Tensor, tuple[Tensor | None, None, Tensor]]",
    "vector_quantize_pytorch.FSP([8, 5, 5, 5])": "tuple[Tensor, Tensor, Tensor, dict[str, Any]]",
    "vector_quantize_pytorch.FSQ([8, 5, 5, 5])": "tuple[Tensor, Tensor | None]",
    "vector_quantize_pytorch.LatentQuantize([5, 5], 4)": THREE_TENSORS,
    "vector_quantize_pytorch.ResidualFSQ(levels=[5, 5], num_quantizers=2)": "tuple[Tensor, Tensor]",
    "vector_quantize_pytorch.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2)": THREE_TENSORS,
    "vector_quantize_pytorch.LFQ(dim=4)": "Return",
    "vector_quantize_pytorch.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8)": THREE_TENSORS,
    "vector_quantize_pytorch.SimVQ(4, 8)": THREE_TENSORS,
    "vector_quantize_pytorch.VectorQuantize(4, 8)": THREE_TENSORS,
}
CALLS = {
    **{f"{module}(x)": result for module, result in {**LAYERS, **OTHER_MODULES}.items()},
    "losses.HistoricalAveraging(linear.parameters())()": "Tensor",
    "nn.VectorQuantizer(8, 4)(x, return_terms=True)": "tuple[Tensor, Tensor, Tensor, LossTerms]",
    "vector_quantize_pytorch.LFQ(dim=4)(x, return_loss_breakdown=True)": "tuple[Return, LossBreakdown]",
    "genperf.patch(linear)": "PatchReport",
    "genperf.frechet_distance(x[0], x, x[0], x)": "Tensor",
    "genperf.frechet_distance(x[0], x, x[0], x, return_error=True)": "tuple[Tensor, Tensor]",
    "genperf.trace_sqrt_product(x, x, return_error=True)": "tuple[Tensor, Tensor]",
}
PACKAGES = {"genperf": genperf, "losses": losses, "metrics": metrics, "models": models, "nn": genperf.nn}
NAMES = [f"{package}.{name}" for package, module in PACKAGES.items() for name in module.__all__]
MISTAKES = ["nn.VectorQuantizer('8', 4)", "nn.VectorQuantizer(8, 4)('x')", "nn.ResidualVectorQuantizer(2, 8, 4)(x, update=1)"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the checker says about each line of a project, by its expression."""
    folder = tmp_path_factory.mktemp("project")
    expressions = [*CALLS, *NAMES, *MISTAKES]
    lines = [f"reveal_type({expression})" if expression not in MISTAKES else expression for expression in expressions]
    (folder / "project.py").write_text(PREAMBLE + "\n".join(lines))
    config = {"include": ["project.py"], "typeCheckingMode": "basic", "extraPaths": [str(Path(genperf.__file__).parents[1])]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    found = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout)
    first = len(PREAMBLE.splitlines())
    said = {expression: [] for expression in expressions}
    for diagnostic in found["generalDiagnostics"]:
        line = diagnostic["range"]["start"]["line"] - first
        assert line >= 0, diagnostic["message"]
        said[expressions[line]].append((diagnostic["severity"], diagnostic["message"]))
    return said


@pytest.mark.parametrize(("call", "result"), CALLS.items())
def test_call_shows_its_result(report, call, result):
    assert report[call] == [("information", f'Type of "{call}" is "{result}"')]


def test_every_layer_is_called():
    with_forward = {
        name for name in genperf.nn.__all__ if getattr(getattr(genperf.nn, name), "forward", nn.Module.forward) is not nn.Module.forward
    }
    assert with_forward == {layer.removeprefix("nn.").partition("(")[0] for layer in LAYERS}


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_known_type(report, name):
    ((severity, message),) = report[name]
    assert severity == "information"
    assert "Unknown" not in message
    if name != "models.option":  # a dataclass field of any type
        assert not message.endswith('-> Any"')


@pytest.mark.parametrize("expression", MISTAKES)
def test_mistake_is_an_error(report, expression):
    assert [severity for severity, _ in report[expression]].count("error") == 1


def test_package_declares_its_types():
    assert (Path(genperf.__file__).parent / "py.typed").is_file()
