# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from genperf.models.latent import attribute_vector, interpolations, lerp, slerp


def plain_slerp(a, b, weight):
    """slerp of one sample, in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    angle = torch.acos((a / a.norm()) @ (b / b.norm()))
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_interpolation_matches_the_formula(shape, dtype, device):
    a, b = torch.randn(2, *shape, device=device).to(dtype)
    weights = torch.rand(5, device=device)
    straight, arc = lerp(a, b, weights), slerp(a, b, weights)
    assert straight.dtype == arc.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for i, weight in enumerate(weights.double()):
        expected = plain_slerp(a[i], b[i], weight)
        torch.testing.assert_close(arc[i].double().flatten(), expected, rtol=tolerance, atol=tolerance)
        expected = (1 - weight) * a[i].double() + weight * b[i].double()
        torch.testing.assert_close(straight[i].double(), expected, rtol=tolerance, atol=tolerance)
    for way in (lerp, slerp):
        torch.testing.assert_close(way(a, b, 0.3), way(a, b, torch.full((5,), 0.3, device=device)))
        torch.testing.assert_close(way(a, b, 0.0), a)
        torch.testing.assert_close(way(a, b, 1.0), b)


def test_slerp_has_constant_speed_and_norm(device):
    a, b = torch.tensor([[2.0, 0.0]], device=device), torch.tensor([[0.0, 2.0]], device=device)
    angles = torch.tensor([step * math.pi / 8 for step in range(5)], device=device)
    torch.testing.assert_close(interpolations(a, b, 5)[0], 2 * torch.stack([angles.cos(), angles.sin()], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("a", "b"), [([1.0, 2], [1, 2]), ([1.0, 2], [3, 6]), ([1.0, 2], [-1, -2]), ([0.0, 0], [1, 2]), ([1.0, 2], [0, 0]), ([0.0, 0], [0, 0])]
)
def test_slerp_falls_back_to_lerp(a, b, dtype):
    a, b = (torch.tensor([t], dtype=dtype, requires_grad=True) for t in (a, b))
    point = slerp(a, b, 0.25)
    torch.testing.assert_close(point, lerp(a, b, 0.25))
    point.sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_slerp_of_scalars_is_lerp():
    a, b = torch.randn(2, 4)
    torch.testing.assert_close(slerp(a, b, torch.rand(4).fill_(0.3)), lerp(a, b, 0.3))


@pytest.mark.parametrize("turn", [1e-3, 1e-2, math.pi - 1e-2])
def test_slerp_keeps_the_norm_near_zero_and_pi(turn):
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(turn), math.sin(turn)]])
    torch.testing.assert_close(interpolations(a, b, 9).norm(dim=2), torch.ones(1, 9), rtol=1e-4, atol=0)


def test_slerp_gradients():
    a, b = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    weights = torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: slerp(x, y, weights), (a.detach().requires_grad_(), b.detach().requires_grad_()))


@pytest.mark.parametrize("kind", ["lerp", "slerp"])
def test_interpolations_stack_single_points(kind):
    a, b = torch.randn(2, 3, 2, 4)
    rows = interpolations(a, b, 4, kind)
    assert rows.shape == (3, 4, 2, 4)
    way = {"lerp": lerp, "slerp": slerp}[kind]
    for step in range(4):
        torch.testing.assert_close(rows[:, step], way(a, b, step / 3))


def test_attribute_vector_is_the_difference_of_means():
    smiling, serious = torch.randn(7, 2, 3) + 4, torch.randn(5, 2, 3)
    torch.testing.assert_close(attribute_vector(smiling, serious), smiling.mean(0) - serious.mean(0))
    assert attribute_vector(torch.ones(4096, 1).bfloat16(), torch.zeros(4096, 1).bfloat16()) == 1


A = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lerp(A, A[:2], 0.5), ValueError, r"lerp: a and b must have the same shape, got \[3, 2\] and \[2, 2\]"),
        (lambda: slerp(A, A.double(), 0.5), TypeError, "slerp: a and b must have the same dtype, got torch.float32 and torch.float64"),
        (lambda: slerp(A.long(), A.long(), 0.5), TypeError, "slerp: a must"),
        (lambda: slerp(A.sum(), A.sum(), 0.5), ValueError, "slerp: a must have a batch dimension"),
        (lambda: lerp(A, A, torch.zeros(2)), ValueError, r"lerp: weights must be a scalar or have shape \[3\], got \[2\]"),
        (lambda: interpolations(A, A, 1), ValueError, "steps must be at least 2, got 1"),
        (lambda: interpolations(A, A, 3, "cubic"), ValueError, "kind must be one of lerp, slerp, got 'cubic'"),
        (lambda: attribute_vector(A, A[:0]), ValueError, r"at least one each, got \[3, 2\] and \[0, 2\]"),
        (lambda: attribute_vector(A, A[:, :1]), ValueError, r"samples of the same shape, .* got \[3, 2\] and \[3, 1\]"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
