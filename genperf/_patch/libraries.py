# SPDX-License-Identifier: Apache-2.0
"""The libraries that `genperf.patch` knows: for each top-level package a function from a class to its adapter, or None."""

from . import audio_codecs, diffusers, taming, transformers, vector_quantize_pytorch

LIBRARIES = {
    "dac": audio_codecs.dac,
    "diffusers": diffusers.find,
    "encodec": audio_codecs.encodec,
    "moshi": audio_codecs.moshi,
    "taming": taming.find,
    "transformers": transformers.find,
    "vector_quantize_pytorch": vector_quantize_pytorch.find,
}
