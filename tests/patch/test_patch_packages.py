# SPDX-License-Identifier: Apache-2.0
"""genperf.patch on the packages encodec, descript-audio-codec, moshi and taming-transformers. Skipped where they cannot be imported."""

from functools import partial

import pytest
import torch
from side_by_side import assert_patch_keeps, seeded

import genperf

FRAMES = (2, 16, 80)


def test_encodec():
    vq = pytest.importorskip("encodec.quantization", exc_type=(ImportError, OSError))

    def call(quantizer, x):
        result = quantizer(x, 75)
        return result.quantized, result.codes, result.penalty, quantizer.encode(x, 75), quantizer.decode(result.codes)

    replaced = {"ResidualVectorQuantization", "EuclideanCodebook"}
    for kmeans in (False, True):
        make = partial(vq.ResidualVectorQuantizer, 16, 4, 32, kmeans_init=kmeans, kmeans_iters=2)
        assert_patch_keeps(make, call, FRAMES, replaced=replaced)


def test_descript_audio_codec():
    quantize = pytest.importorskip("dac.nn.quantize", exc_type=(ImportError, OSError))
    make = partial(quantize.ResidualVectorQuantize, 16, 3, 32, 8, quantizer_dropout=0.5)
    assert_patch_keeps(make, lambda quantizer, z: quantizer(z), FRAMES, replaced={"VectorQuantize"})


def test_moshi():
    vq = pytest.importorskip("moshi.quantization.vq", exc_type=(ImportError, OSError))

    def make():
        quantizer = vq.SplitResidualVectorQuantizer(dimension=16, n_q=4, bins=32, input_dimension=24, output_dimension=24)
        for module in quantizer.modules():
            if "_initialized" in module._buffers:
                module._initialized.fill_(1)
        return quantizer

    def call(quantizer, x):
        results = [quantizer(x, 12) for _ in range(4 if quantizer.training else 1)]  # the fifth step draws codes from x, with its graph
        return [(r.x, r.codes, r.penalty) for r in results], quantizer.encode(x), quantizer.decode(results[0].codes)

    assert_patch_keeps(make, call, (2, 24, 80), replaced={"ResidualVectorQuantization", "EuclideanCodebook"})


def test_taming():
    quantize = pytest.importorskip("taming.modules.vqvae.quantize", exc_type=ImportError)

    def call(quantizer, z):
        quantized, loss, (perplexity, _, indices) = quantizer(z)
        return quantized, loss, perplexity, indices

    assert_patch_keeps(lambda: quantize.VectorQuantizer(32, 8, 0.25), call, (2, 8, 6, 6), replaced={"VectorQuantizer"})


def test_taming_of_its_repository():
    """VectorQuantizer2 and GumbelQuantize are not in the package of the index."""
    quantize = pytest.importorskip("taming.modules.vqvae.quantize", exc_type=ImportError)
    if not hasattr(quantize, "VectorQuantizer2"):
        pytest.skip("taming-transformers of the index has no VectorQuantizer2")
    for options in ({}, {"legacy": False, "sane_index_shape": True}):
        make = partial(quantize.VectorQuantizer2, 32, 8, 0.25, **options)
        assert_patch_keeps(make, lambda quantizer, z: quantizer(z), (2, 8, 6, 6), replaced={"VectorQuantizer2"})
    # Its noise is another: the loss has none.
    quantizers = [seeded(partial(quantize.GumbelQuantize, 8, 16, 32), 0) for _ in range(2)]
    assert genperf.patch(quantizers[0]).replaced
    z = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(*(each(z)[1] for each in quantizers))
    quantizers[0].temperature = 0.5
    genperf.unpatch(quantizers[0])
    assert quantizers[0].temperature == 0.5
