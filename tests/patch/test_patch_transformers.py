# SPDX-License-Identifier: Apache-2.0
"""genperf.patch on the codecs, image tokenizers and Gumbel quantizers of transformers. Skipped where transformers is not installed."""

import importlib

import pytest
import torch
from side_by_side import assert_patch_keeps
from torch import nn

import genperf

pytest.importorskip("transformers")


def classes(name):
    """The configuration and modeling modules of a model."""
    try:
        return [importlib.import_module(f"transformers.models.{name}.{part}_{name}") for part in ("configuration", "modeling")]
    except ImportError as error:
        pytest.skip(str(error))


def of(name, config, quantizer, *, dim=None, **options):
    def make():
        configuration, modeling = classes(name)
        return getattr(modeling, quantizer)(getattr(configuration, config)(**options))

    return make


def codes_and_decoded(quantizer, x):
    codes = quantizer.encode(x)
    # Mimi takes and others give the quantizers first.
    return codes, quantizer.decode(codes.transpose(0, 1) if "Mimi" in type(quantizer).__name__ else codes)


SMALL = {"codebook_size": 64, "codebook_dim": 16}
FRAMES = (2, 16, 80)

RESIDUAL = {
    "encodec": (
        of("encodec", "EncodecConfig", "EncodecResidualVectorQuantizer", **SMALL, target_bandwidths=[1.5], upsampling_ratios=[8, 5, 4, 2]),
        FRAMES,
        {"EncodecResidualVectorQuantizer", "EncodecEuclideanCodebook"},
    ),
    "mimi": (
        of(
            "mimi",
            "MimiConfig",
            "MimiSplitResidualVectorQuantizer",
            **SMALL,
            num_quantizers=4,
            hidden_size=24,
            vector_quantization_hidden_dimension=16,
        ),
        (2, 24, 80),
        {"MimiResidualVectorQuantizer", "MimiEuclideanCodebook"},
    ),
    "xcodec": (
        of("xcodec", "XcodecConfig", "XcodecResidualVectorQuantization", codebook_size=64, target_bandwidths=[0.5, 1]),
        (2, 1024, 40),
        {"XcodecResidualVectorQuantization", "XcodecEuclideanCodebook"},
    ),
    "higgs_audio_v2_tokenizer": (
        of("higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerConfig", "HiggsAudioV2TokenizerResidualVectorQuantization", codebook_size=64),
        (2, 1024, 20),
        {"HiggsAudioV2TokenizerEuclideanCodebook"},
    ),
    "wavtokenizer": (
        of("wavtokenizer", "WavTokenizerConfig", "WavTokenizerVectorQuantization", codebook_size=64),
        (2, 512, 20),
        {"WavTokenizerEuclideanCodebook"},
    ),
    "encodec few frames": (
        of("encodec", "EncodecConfig", "EncodecResidualVectorQuantizer", **SMALL, target_bandwidths=[1.5]),
        (1, 16, 3),
        {"EncodecResidualVectorQuantizer", "EncodecEuclideanCodebook"},
    ),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_quantizers(name):
    make, shape, replaced = RESIDUAL[name]
    assert_patch_keeps(make, codes_and_decoded, shape, replaced=replaced)


def test_half_precision_rounds_residuals_as_upstream():
    """Mimi searches in float32 in either case."""
    make, shape, replaced = RESIDUAL["mimi"]
    assert_patch_keeps(make, lambda q, x: q.bfloat16().encode(x.bfloat16()), shape, replaced=replaced)


DAC = of(
    "dac", "DacConfig", "DacResidualVectorQuantizer", hidden_size=16, codebook_dim=8, codebook_size=64, n_codebooks=3, quantizer_dropout=0.5
)


@pytest.mark.parametrize(
    "call", [lambda q, x: q(x), lambda q, x: q.from_latents(torch.cat([x, x[:, :8]], 1))], ids=["forward", "from_latents"]
)
def test_dac(call):
    assert_patch_keeps(DAC, call, FRAMES, replaced={"DacVectorQuantize"})


IMAGES = {"num_embeddings": 64, "embed_dim": 16}


@pytest.mark.parametrize(
    ("name", "prefix", "options", "shape"),
    [
        ("chameleon", "Chameleon", IMAGES, (2, 16, 6, 5)),
        ("glm_image", "GlmImage", IMAGES, (2, 16, 6, 5)),
        ("janus", "Janus", IMAGES, (2, 16, 6, 5)),
        ("emu3", "Emu3", {"codebook_size": 64, "embed_dim": 16}, (2, 3, 16, 6, 5)),
    ],
)
def test_image_tokenizers(name, prefix, options, shape):
    cls = f"{prefix}VQVAEVectorQuantizer"
    assert_patch_keeps(of(name, f"{prefix}VQVAEConfig", cls, **options), lambda q, x: q(x), shape, replaced={cls})


@pytest.mark.parametrize(("name", "prefix"), [("neucodec", "NeuCodec"), ("xcodec2", "Xcodec2")])
def test_finite_scalar_quantizers(name, prefix):
    make = of(name, f"{prefix}Config", f"{prefix}Quantizer", quantization_dim=24)
    assert_patch_keeps(make, lambda q, x: q(x), (2, 30, 24), replaced={f"{prefix}FiniteScalarQuantization"})


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("wav2vec2", "Wav2Vec2"),
        ("wav2vec2_conformer", "Wav2Vec2Conformer"),
        ("wavlm", "WavLM"),
        ("unispeech", "UniSpeech"),
        ("unispeech_sat", "UniSpeechSat"),
    ],
)
def test_gumbel_quantizers(name, prefix):
    sizes = {"codevector_dim": 16, "num_codevectors_per_group": 20, "hidden_size": 32, "num_attention_heads": 2}
    make = of(name, f"{prefix}Config", f"{prefix}GumbelVectorQuantizer", **sizes, conv_dim=(32,), conv_kernel=(3,), conv_stride=(2,))

    def call(quantizer, x):
        masked = quantizer(x, torch.rand(x.shape[:2]) > 0.5) if name.startswith("wav2vec2") else ()
        return quantizer(x), masked

    assert_patch_keeps(make, call, (2, 9, 32), replaced={f"{prefix}GumbelVectorQuantizer"})


def test_largest_inner_product_is_left():
    make = of("apertus1p5", "Apertus1p5VisionTokenizerConfig", "Apertus1p5VisionTokenizerVectorQuantizer", codebook_size=8, embed_dim=4)
    (left,) = genperf.patch(make()).left
    assert left.reason == "it searches the largest inner product, for which genperf has no kernel"


def test_a_whole_codec(tmp_path):
    """EncodecModel: encoding, decoding and a checkpoint."""
    configuration, modeling = classes("encodec")
    config = configuration.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=64, target_bandwidths=[1.5], num_lstm_layers=1)

    def call(model, audio):
        encoded = model.encode(audio, bandwidth=1.5)
        return encoded.audio_codes, model.decode(encoded.audio_codes, encoded.audio_scales)[0]

    replaced = {"EncodecResidualVectorQuantizer", "EncodecEuclideanCodebook"}
    assert_patch_keeps(lambda: modeling.EncodecModel(config), call, (1, 1, 22000), replaced=replaced)
    model = modeling.EncodecModel(config).eval()
    genperf.patch(model)
    model.save_pretrained(tmp_path)
    loaded = modeling.EncodecModel.from_pretrained(tmp_path).eval()
    audio = torch.randn(1, 1, 22000)
    for found, expected in zip(call(loaded, audio), call(model, audio), strict=True):
        torch.testing.assert_close(found, expected)


def test_hooks_of_accelerate_load_the_codes():
    """They would be on the meta device; the hook of upstream's decode_latents is called."""
    quantizer, calls = DAC(), []

    class Hook:
        def pre_forward(self, module, *inputs):
            calls.append(module)

        def post_forward(self, module, output):
            calls.append(output)

    first = quantizer.quantizers[0]
    first.codebook._hf_hook = Hook()
    genperf.patch(quantizer)
    first.decode_latents(torch.randn(1, 8, 4))
    assert calls == [first.codebook, ()]


def test_patch_reads_no_property():
    """Mimi keeps the codes of when its `embed` was first read; it would keep those from before a checkpoint is loaded."""
    quantizer = RESIDUAL["mimi"][0]()
    genperf.patch(quantizer)
    assert quantizer.semantic_residual_vector_quantizer.layers[0].codebook._embed is None


def test_a_class_of_another_version_is_left():
    make, _, _ = RESIDUAL["wavtokenizer"]
    quantizer = make()
    quantizer.codebook.codes = quantizer.codebook._buffers.pop("embed")
    (left,) = genperf.patch(nn.ModuleList([quantizer])).left
    assert left.reason == "this version of the class has no attribute embed"
