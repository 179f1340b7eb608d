# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from scipy import ndimage

from genperf.nn.laplacian_pyramid import LaplacianPyramid

KERNELS = ("binomial", "box")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 13, 7), (1, 3, 32, 20), (3, 5, 1), (0, 1, 8, 8), (2, 3, 2, 9, 8)])
@pytest.mark.parametrize("levels", [1, 3])
def test_reconstruction_is_exact(kernel, shape, levels, device):
    pyramid = LaplacianPyramid(levels, kernel)
    pyramid.to(device)
    images = torch.rand(shape, device=device)
    bands = pyramid.decompose(images)
    sizes = [shape[-2:]]
    for _ in range(levels):
        sizes.append(tuple((size + 1) // 2 for size in sizes[-1]))
    assert [tuple(band.shape) for band in bands] == [(*shape[:-2], *size) for size in sizes]
    torch.testing.assert_close(pyramid.reconstruct(bands), images, rtol=0, atol=1e-6)
    assert not pyramid.state_dict()


def interpolated(x, size):
    """`up` of Burt and Adelson along the last axis: insert zeros between pixels, then blur and double."""
    padded = np.concatenate([x[..., :1], x, x[..., -1:]], -1)
    spaced = np.zeros((*padded.shape[:-1], 2 * padded.shape[-1]))
    spaced[..., ::2] = padded
    return ndimage.convolve1d(spaced, np.array([1, 4, 6, 4, 1]) / 8, axis=-1, mode="constant")[..., 2 : 2 + size]


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 2)])
def test_binomial_matches_burt_and_adelson(size):
    pyramid = LaplacianPyramid(1).double()
    image = torch.randn(2, *size, dtype=torch.float64)
    blurred = image.numpy()
    for axis in (1, 2):
        blurred = ndimage.convolve1d(blurred, np.array([1, 4, 6, 4, 1]) / 16, axis=axis, mode="nearest")
    down = pyramid.down(image)
    torch.testing.assert_close(down, torch.from_numpy(blurred[:, ::2, ::2].copy()))
    up = interpolated(interpolated(down.numpy(), size[1]).swapaxes(1, 2), size[0]).swapaxes(1, 2)
    torch.testing.assert_close(pyramid.up(down, size), torch.from_numpy(up.copy()))


def test_box_averages_and_repeats():
    pyramid = LaplacianPyramid(1, "box")
    images = torch.rand(2, 3, 6, 4)
    down = pyramid.down(images)
    torch.testing.assert_close(down, torch.nn.functional.avg_pool2d(images, 2))
    torch.testing.assert_close(pyramid.up(down), down.repeat_interleave(2, -1).repeat_interleave(2, -2))
    torch.testing.assert_close(pyramid.up(down, (5, 4)), pyramid.up(down)[..., :5, :])


@pytest.mark.parametrize("kernel", KERNELS)
def test_constant_image_has_zero_bands(kernel):
    *bands, coarse = LaplacianPyramid(2, kernel).decompose(torch.full((1, 1, 9, 12), 0.7))
    assert all(band.abs().max() < 1e-6 for band in bands)
    torch.testing.assert_close(coarse, torch.full((1, 1, 3, 3), 0.7))


@pytest.mark.parametrize("kernel", KERNELS)
def test_differentiable_twice(kernel):
    pyramid = LaplacianPyramid(2, kernel).double()
    images = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    bands = pyramid.decompose(images)
    torch.testing.assert_close(*(torch.autograd.grad(pyramid.reconstruct(bands).square().sum(), images)[0], 2 * images))

    def energies(x):
        return torch.stack([band.pow(3).sum() for band in pyramid.decompose(x)])

    assert torch.autograd.gradcheck(energies, images)
    assert torch.autograd.gradgradcheck(energies, images)


def test_filters_are_exact_under_autocast(device):
    pyramid = LaplacianPyramid(2).to(device)
    images = torch.rand(1, 1, 8, 8, device=device)
    expected = pyramid.decompose(images)
    with torch.autocast(device, dtype=torch.bfloat16):
        bands = pyramid.decompose(images)
    assert all(torch.equal(a, b) for a, b in zip(bands, expected, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LaplacianPyramid(0), ValueError, "levels must be at least 1, got 0"),
        (lambda: LaplacianPyramid(1, "gauss"), ValueError, "kernel must be one of binomial, box, got 'gauss'"),
        (lambda: LaplacianPyramid(1).down(torch.zeros(4, 4)), ValueError, r"down: images must be \[..., H, W\] .* got \[4, 4\]"),
        (
            lambda: LaplacianPyramid(1).down(torch.zeros(1, 4, 4).long()),
            TypeError,
            "down: images must be of a floating dtype, got torch.int64",
        ),
        (
            lambda: LaplacianPyramid(1).up(torch.zeros(1, 4, 4), (8, 9)),
            ValueError,
            "up: size must be twice x's, or 1 less, got 8 x 9 for 4 x 4",
        ),
        (lambda: LaplacianPyramid(1).reconstruct([torch.zeros(1, 4, 4)]), ValueError, "reconstruct: there must be 2 bands, got 1"),
        (
            lambda: LaplacianPyramid(1).reconstruct([torch.zeros(2, 4, 4), torch.zeros(1, 2, 2)]),
            ValueError,
            r"must agree but for height and width, got \[2, 4, 4\] over \[1, 2, 2\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=f"LaplacianPyramid.*{message}"):
        call()
