# SPDX-License-Identifier: Apache-2.0
"""genperf.patch on the autoencoders of diffusers. Skipped where diffusers is not installed."""

import pickle

import numpy as np
import pytest
import torch
from side_by_side import assert_patch_keeps

import genperf

pytest.importorskip("diffusers", exc_type=ImportError)


def test_vq_model():
    from diffusers import VQModel

    def make():
        return VQModel(block_out_channels=(8,), latent_channels=4, num_vq_embeddings=64, norm_num_groups=4)

    def call(model, images):
        output = model(images)
        return output.sample, output.commit_loss, model.quantize(model.encode(images).latents)

    assert_patch_keeps(make, call, (2, 3, 8, 8), replaced={"VectorQuantizer"})


@pytest.mark.parametrize("unknown_index", ["extra", 3])
def test_remapped_indices(unknown_index, tmp_path):
    from diffusers.models.autoencoders.vae import VectorQuantizer

    path = tmp_path / "used.npy"
    np.save(path, np.arange(0, 60, 2))

    def make():
        return VectorQuantizer(64, 4, 0.25, str(path), unknown_index, sane_index_shape=True, legacy=False)

    assert_patch_keeps(make, lambda quantizer, z: quantizer(z), (2, 4, 6, 6), replaced={"VectorQuantizer"})


def test_latent_distribution():
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def make():
        return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)

    def call(model, images):
        posterior = model.encode(images).latent_dist
        (other,) = model.encode(images, return_dict=False)
        assert isinstance(posterior, DiagonalGaussianDistribution)
        assert type(other) is type(posterior)
        sample = posterior.sample(torch.Generator().manual_seed(0))
        return sample, posterior.kl(), posterior.nll(sample.detach()), model(images, sample_posterior=True).sample

    assert_patch_keeps(make, call, (2, 3, 8, 8), replaced={"AutoencoderKL"})
    model = make()
    genperf.patch(model)
    assert isinstance(model.encode(torch.randn(1, 3, 8, 8)).latent_dist, genperf.compat.diffusers.DiagonalGaussianDistribution)
    posterior = model.encode(torch.randn(1, 3, 8, 8)).latent_dist
    copied = pickle.loads(pickle.dumps(type(posterior)(posterior.parameters.detach())))
    torch.testing.assert_close(copied.kl(), posterior.kl())


def test_only_classes_with_the_distribution_are_replaced():
    from diffusers import AutoencoderTiny

    report = genperf.patch(AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4))
    assert report.replaced == []
