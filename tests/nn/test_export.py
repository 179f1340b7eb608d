"""Layers in exported programs: ONNX holds plain operators of PyTorch, torch.export and AOTInductor the compiled ops."""

import pytest
import torch
from torch import nn

from genperf.compat import vector_quantize_pytorch as vqp
from genperf.nn import FiniteScalarQuantizer, LookupFreeQuantizer, ResidualVectorQuantizer, VectorQuantizer

LAYERS = {
    "VectorQuantizer": lambda: VectorQuantizer(16, 4, decay=0.9),
    "VectorQuantizer of images": lambda: VectorQuantizer(16, 4, code_dim=3, heads=2, separate_codebooks=True, channel_dim=1),
    "VectorQuantizer cosine": lambda: VectorQuantizer(16, 4, metric="cosine"),
    "ResidualVectorQuantizer": lambda: ResidualVectorQuantizer(3, 8, 4),
    "FiniteScalarQuantizer": lambda: FiniteScalarQuantizer([8, 5, 5], dim=4, num_codebooks=2),
    "FiniteScalarQuantizer of images": lambda: FiniteScalarQuantizer([8, 5, 5, 5], symmetric=True, channel_dim=1),
    "LookupFreeQuantizer": lambda: LookupFreeQuantizer(4, dim=4, spherical=True),
    "drop-in VectorQuantize": lambda: vqp.VectorQuantize(4, 16),
    "drop-in FSQ": lambda: vqp.FSQ([8, 5, 5, 5]),
    "drop-in LFQ": lambda: vqp.LFQ(codebook_size=16, dim=4),
}
DECODERS = {name: LAYERS[name] for name in LAYERS if name not in ("ResidualVectorQuantizer", "drop-in VectorQuantize")}
# An older exporter, which records one call.
TRACED = [name for name in LAYERS if name not in ("ResidualVectorQuantizer", "VectorQuantizer of images")]


class Encode(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(self, x):
        return self.layer.encode(x) if hasattr(self.layer, "encode") else self.layer(x)[1]


class Decode(Encode):
    def forward(self, indices):
        return self.layer.decode(indices) if hasattr(self.layer, "decode") else self.layer.indices_to_codes(indices)


def inputs(name):
    """Two inputs whose sizes differ in all dimensions but the channels."""
    torch.manual_seed(1)
    return (torch.randn(2, 4, 7, 5), torch.randn(3, 4, 6, 9)) if "images" in name else (torch.randn(2, 7, 4), torch.randn(5, 9, 4))


def dynamic_sizes(x, channel=None):
    return {dim: f"size{dim}" for dim in range(x.dim()) if dim != channel}


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_encodes(name, tmp_path):
    pytest.importorskip("onnxscript")
    module = Encode(LAYERS[name]())
    x, other = inputs(name)
    path = str(tmp_path / "encode.onnx")
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=(dynamic_sizes(x, 1 if "images" in name else 2),), verbose=False)
    for batch in (x, other):
        assert torch.equal(run_onnx(path, batch), module(batch))


@pytest.mark.parametrize("name", DECODERS)
def test_onnx_decodes(name, tmp_path):
    pytest.importorskip("onnxscript")
    layer = DECODERS[name]()
    module = Decode(layer)
    x, other = (Encode(layer)(batch) for batch in inputs(name))
    path = str(tmp_path / "decode.onnx")
    codebooks = x.dim() - 1 if x.dim() == (4 if "images" in name else 3) else None
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=(dynamic_sizes(x, codebooks),), verbose=False)
    for indices in (x, other):
        torch.testing.assert_close(run_onnx(path, indices), module(indices))


def test_onnx_with_fixed_sizes(tmp_path):
    pytest.importorskip("onnxscript")
    module = Encode(VectorQuantizer(16, 4))
    x = torch.randn(3, 4)
    torch.onnx.export(module, (x,), str(tmp_path / "fixed.onnx"), dynamo=True, verbose=False)
    assert torch.equal(run_onnx(str(tmp_path / "fixed.onnx"), x), module(x))


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore")
def test_torchscript_exporter(name, tmp_path):
    pytest.importorskip("onnx")
    module = Encode(LAYERS[name]())
    x, other = inputs(name)
    path = str(tmp_path / "traced.onnx")
    axes = {"x": dynamic_sizes(x, 1 if "images" in name else 2)}
    torch.onnx.export(module, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    for batch in (x, other):
        assert torch.equal(run_onnx(path, batch), module(batch))


def test_onnx_search_breaks_ties_and_takes_data_far_from_the_origin(tmp_path):
    """Equal codes: the lowest index. Offsets: the search subtracts one code, which float64 does exactly."""
    pytest.importorskip("onnxscript")
    layer = VectorQuantizer(40, 4)
    with torch.no_grad():
        layer.codebook.copy_(torch.randint(-2, 3, (20, 4)).float().repeat(2, 1) + 1e4)
    module = Encode(layer)
    x = torch.randint(-3, 4, (200, 4)).float() + 1e4
    torch.onnx.export(module, (x,), str(tmp_path / "ties.onnx"), dynamo=True, verbose=False)
    assert torch.equal(run_onnx(str(tmp_path / "ties.onnx"), x), module(x))


def exported(name):
    module = Encode(LAYERS[name]())
    x, other = inputs(name)
    sizes = dict.fromkeys(dynamic_sizes(x, 1 if "images" in name else 2), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return module, torch.export.export(module, (x,), dynamic_shapes=(sizes,)), other


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "VectorQuantizer of images"])
def test_torch_export_keeps_the_compiled_ops(name):
    module, program, x = exported(name)
    assert any("genperf." in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), module(x))


def test_ahead_of_time_inductor(tmp_path):
    module, program, x = exported("FiniteScalarQuantizer")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "encode.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(package)(x), module(x))
