# SPDX-License-Identifier: Apache-2.0
"""Layers in exported programs: ONNX holds plain operators of PyTorch, torch.export and AOTInductor the compiled ops."""

import pytest
import torch
from torch import nn

from genperf.compat import diffusers, taming
from genperf.compat import vector_quantize_pytorch as vqp
from genperf.nn import FiniteScalarQuantizer, LookupFreeQuantizer, ResidualVectorQuantizer, VectorQuantizer

LAYERS = {
    "VectorQuantizer": lambda: VectorQuantizer(16, 4, decay=0.9),
    "VectorQuantizer of images": lambda: VectorQuantizer(16, 4, code_dim=3, heads=2, separate_codebooks=True, channel_dim=1),
    "VectorQuantizer cosine": lambda: VectorQuantizer(16, 4, metric="cosine", heads=2),
    "ResidualVectorQuantizer": lambda: ResidualVectorQuantizer(3, 8, 4),
    "ResidualVectorQuantizer of images": lambda: ResidualVectorQuantizer(2, 8, 4, groups=2, code_dim=3, decay=0.9, channel_dim=1),
    "ResidualVectorQuantizer cosine": lambda: ResidualVectorQuantizer(2, 8, 4, shared_codebook=True, metric="cosine"),
    "FiniteScalarQuantizer": lambda: FiniteScalarQuantizer([8, 5, 5], dim=4, num_codebooks=2),
    "FiniteScalarQuantizer of images": lambda: FiniteScalarQuantizer([8, 5, 5, 5], symmetric=True, channel_dim=1),
    "LookupFreeQuantizer": lambda: LookupFreeQuantizer(4, dim=4, spherical=True),
    "drop-in VectorQuantize": lambda: vqp.VectorQuantize(4, 16),
    "drop-in VectorQuantize of images": lambda: vqp.VectorQuantize(4, 16, accept_image_fmap=True, use_cosine_sim=True, heads=2),
    "drop-in ResidualVQ": lambda: vqp.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, quantize_dropout=True),
    "drop-in ResidualVQ, one by one": lambda: vqp.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, shared_codebook=True),
    "drop-in GroupedResidualVQ of images": lambda: vqp.GroupedResidualVQ(
        dim=4, groups=2, num_quantizers=1, codebook_size=8, codebook_dim=3, accept_image_fmap=True
    ),
    "drop-in FSQ": lambda: vqp.FSQ([8, 5, 5, 5]),
    "drop-in LFQ": lambda: vqp.LFQ(codebook_size=16, dim=4),
    "drop-in SimVQ of images": lambda: vqp.SimVQ(4, 16, channel_first=True),
    "taming of images": lambda: taming.VectorQuantizer2(16, 4, 0.25, remap=torch.arange(8), unknown_index="extra", sane_index_shape=True),
    "diffusers of images": lambda: diffusers.VectorQuantizer(16, 4, 0.25, sane_index_shape=True),
}
# Their parts are those of other layers, and a graph by dynamo takes ten times as long as a recorded one.
RECORDED_ONLY = ("drop-in ResidualVQ, one by one", "drop-in SimVQ of images", "diffusers of images")


class Encode(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(self, x):
        if hasattr(self.layer, "encode"):
            return self.layer.encode(x)
        indices = self.layer(x)[1:]
        return indices[1][2] if hasattr(self.layer, "get_codebook_entry") else indices[0]


class Codec(Encode):
    """Encodes x, and decodes indices that are not those of x."""

    def forward(self, x, indices):
        return super().forward(x), self.decode(indices)

    def decode(self, indices):
        if hasattr(self.layer, "get_codebook_entry"):
            return self.layer.get_codebook_entry(indices, None)
        names = ("decode", "indices_to_codes", "get_output_from_indices")
        return next(getattr(self.layer, name) for name in names if hasattr(self.layer, name))(indices)


def batches(name):
    """Two inputs whose sizes differ in all dimensions but the channels."""
    torch.manual_seed(1)
    return (torch.randn(2, 4, 7, 5), torch.randn(3, 4, 6, 9)) if "images" in name else (torch.randn(2, 7, 4), torch.randn(5, 9, 4))


def dynamic_sizes(first, second, prefix="size"):
    """The dimensions in which two tensors differ, each with a name of its own."""
    return {dim: f"{prefix}{dim}" for dim in range(first.dim()) if first.shape[dim] != second.shape[dim]}


def run_onnx(path, *inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "dynamo"), [(name, dynamo) for name in LAYERS for dynamo in (True, False) if not (dynamo and name in RECORDED_ONLY)]
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_encodes_and_decodes(name, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    module = Codec(LAYERS[name]())
    x, other = batches(name)
    indices, other_indices = (Encode.forward(module, batch).flip(1) for batch in (x, other))
    if "of images" not in name or "VectorQ" in name:
        other_indices[1, 2] = -1
    sizes = dynamic_sizes(x, other), dynamic_sizes(indices, other_indices, "of_indices")
    if dynamo:
        options = {"dynamic_shapes": sizes}
    else:
        options = {"input_names": ["x", "indices"], "dynamic_axes": dict(zip(("x", "indices"), sizes, strict=True))}
    path = str(tmp_path / "codec.onnx")
    torch.onnx.export(module, (x, indices), path, dynamo=dynamo, verbose=False, **options)
    for inputs in ((x, indices), (other, other_indices)):
        found, codes = run_onnx(path, *inputs)
        expected, expected_codes = module(*inputs)
        assert torch.equal(found, expected)
        torch.testing.assert_close(codes, expected_codes)


def test_onnx_with_fixed_sizes(tmp_path):
    pytest.importorskip("onnxscript")
    module = Encode(LAYERS["drop-in ResidualVQ"]())
    x = batches("drop-in ResidualVQ")[0]
    torch.onnx.export(module, (x,), str(tmp_path / "fixed.onnx"), dynamo=True, verbose=False)
    assert torch.equal(run_onnx(str(tmp_path / "fixed.onnx"), x)[0], module(x))


def test_onnx_search_breaks_ties_and_takes_data_far_from_the_origin(tmp_path):
    """Equal codes: the lowest index. Offsets: the search subtracts one code, which float64 does exactly."""
    pytest.importorskip("onnxscript")
    layer = VectorQuantizer(40, 4)
    with torch.no_grad():
        layer.codebook.copy_(torch.randint(-2, 3, (20, 4)).float().repeat(2, 1) + 1e4)
    module = Encode(layer)
    x = torch.randint(-3, 4, (200, 4)).float() + 1e4
    torch.onnx.export(module, (x,), str(tmp_path / "ties.onnx"), dynamo=True, verbose=False)
    assert torch.equal(run_onnx(str(tmp_path / "ties.onnx"), x)[0], module(x))


def exported(name):
    module = Encode(LAYERS[name]())
    x, other = batches(name)
    sizes = dict.fromkeys(dynamic_sizes(x, other), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return module, torch.export.export(module, (x,), dynamic_shapes=(sizes,)), other


@pytest.mark.parametrize("name", LAYERS)
def test_torch_export_keeps_the_compiled_ops(name):
    module, program, x = exported(name)
    assert any("genperf." in str(node.target) and "saved_copy" not in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), module(x))


def test_ahead_of_time_inductor(tmp_path):
    module, program, x = exported("FiniteScalarQuantizer")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "encode.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(package)(x), module(x))
