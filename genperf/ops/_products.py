# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the polar iterations: symmetric results of which one triangle is computed, and float32 from half precision."""

import torch
from torch import Tensor

# Sizes from which one triangle of a symmetric product and a copy of it take less time than both triangles, and the size of the blocks that
# remain on the diagonal. On an H200 one set of such blocks fills all multiprocessors with float64 tiles; other dtypes have larger tiles.
TRIANGLE_FROM = {torch.float64: 2048, torch.float32: 4096}
BLOCK = 512

# Size from which the parts of `split_step` take less time than float32 products, and powers of two that keep them in the range of float16:
# singular values of x are at most 2.
SPLIT_FROM = 1024
SCALE, SQUARE = 2.0**6, 2.0**12


def addmm(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * base + alpha * left @ right, fused."""
    if base.dim() == 2:
        return torch.addmm(base, left, right, beta=beta, alpha=alpha)
    shape = base.shape
    base, left, right = (t.flatten(0, -3) for t in (base, left, right))
    return torch.baddbmm(base, left, right, beta=beta, alpha=alpha).reshape(shape)


def symmetric_product(left: Tensor, right: Tensor, base: Tensor | None = None, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """left right', or beta base + alpha left right', of operands that make it symmetric: equal ones, or two that commute.

    A large matrix is halved again and again, and only what lies below the diagonal of the halves is computed: of 2 n^2 k operations
    5/8 remain for n = 2048, and 9/16 for n = 4096.

    Args:
        left, right: [..., n, k].
        base: [..., n, n], symmetric.
    """
    n = left.shape[-2]
    if left.dim() > 2 or n < TRIANGLE_FROM.get(left.dtype, n + 1):
        return left @ right.mT if base is None else addmm(base, left, right.mT, beta, alpha)
    levels = (n // BLOCK).bit_length() - 1
    unit = n >> levels
    even = unit << levels
    result = left.new_empty(n, n)

    def multiply(out: Tensor, rows: Tensor, columns: Tensor, part: Tensor | None) -> None:
        if part is None:
            torch.bmm(rows, columns.mT, out=out)
        else:
            torch.baddbmm(part, rows, columns.mT, beta=beta, alpha=alpha, out=out)

    for level in range(levels):
        count, size = 1 << level, even >> (level + 1)
        below = _blocks(result, count, size, 2 * size, size, 0)
        part = None if base is None else _blocks(base, count, size, 2 * size, size, 0)
        multiply(below, _rows(left, count, size, 2 * size, size), _rows(right, count, size, 2 * size, 0), part)
        _blocks(result, count, size, 2 * size, 0, size).copy_(below.mT)
    count = 1 << levels
    part = None if base is None else _blocks(base, count, unit, unit, 0, 0)
    multiply(_blocks(result, count, unit, unit, 0, 0), _rows(left, count, unit, unit, 0), _rows(right, count, unit, unit, 0), part)
    if even < n:
        rest = result.narrow(0, even, n - even)
        part = None if base is None else base.narrow(0, even, n - even).unsqueeze(0)
        multiply(rest.unsqueeze(0), left.narrow(0, even, n - even).unsqueeze(0), right.unsqueeze(0), part)
        result.narrow(0, 0, even).narrow(1, even, n - even).copy_(rest.narrow(1, 0, even).T)
    return result


def _rows(t: Tensor, count: int, size: int, step: int, start: int) -> Tensor:
    """Rows start + i step ... + size of t [n, k], as [count, size, k]."""
    row, column = t.stride()
    return t.as_strided((count, size, t.shape[1]), (step * row, row, column), t.storage_offset() + start * row)


def _blocks(t: Tensor, count: int, size: int, step: int, start: int, left: int) -> Tensor:
    """Blocks of t [n, n] whose upper left entries are (start + i step, left + i step), as [count, size, size]."""
    row, column = t.stride()
    return t.as_strided((count, size, size), (step * (row + column), row, column), t.storage_offset() + start * row + left * column)


def split_step(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a x + (b g + c g^2) x with g = x x' of float32 x [n, m], whose singular values are at most 2, from float16 products.

    Each operand is the sum of two float16 matrices, which hold 22 bits of its entries. Products of first parts, and of a first with a
    second part, are summed in float32 (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022).
    """
    a, b, c = coefficients
    parts = _parts_of_rows(x)
    gram = _split_gram(parts.narrow(0, 1, 2))  # times SQUARE
    pair = gram.new_empty(2, *gram.shape, dtype=torch.float16)
    _split(gram, *pair.unbind())
    factor = torch.add(gram, _split_gram(pair), alpha=c / (b * SQUARE))  # (g + c / b g^2) SQUARE
    return _split_addmm(x, factor, parts, a, b / (SCALE * SQUARE))


def split_addmm(x: Tensor, factor: Tensor, beta: float) -> Tensor:
    """beta x + factor x of float32 x [n, m] and factor [n, n], with entries up to 4 and 15, from float16 products."""
    return _split_addmm(x, factor * SQUARE, _parts_of_rows(x), beta, 1 / (SCALE * SQUARE))


def split_gram(x: Tensor) -> Tensor:
    """x x' of float32 x [n, m] with entries up to 4, from float16 products."""
    pair = x.new_empty(2, *x.shape, dtype=torch.float16)
    _split(x * SCALE, *pair.unbind())
    return _split_gram(pair).mul_(1 / SQUARE)


def _parts_of_rows(x: Tensor) -> Tensor:
    """first, first and second part [3, n, m] of SCALE x."""
    parts = x.new_empty(3, *x.shape, dtype=torch.float16)
    once, first, second = parts.unbind()
    _split(x * SCALE, first, second)
    once.copy_(first)
    return parts


def _split_addmm(x: Tensor, factor: Tensor, parts: Tensor, beta: float, alpha: float) -> Tensor:
    """beta x + alpha factor parts, the parts being those of x's rows."""
    columns = factor.new_empty(len(factor), 3, len(factor), dtype=torch.float16)  # first, second, first
    first, second, again = columns.unbind(1)
    _split(factor, first, second)
    again.copy_(first)
    product = _half_product(columns.flatten(1).unsqueeze(0), parts.flatten(0, 1).unsqueeze(0)).squeeze(0)
    return product.mul_(alpha).add_(x, alpha=beta)


def _split(x: Tensor, first: Tensor, second: Tensor) -> None:
    """Write x as first + second, which are float16."""
    first.copy_(x)
    torch.sub(x, first, out=second)


def _split_gram(pair: Tensor) -> Tensor:
    """x x' for x = pair[0] + pair[1], exactly symmetric."""
    whole, mixed = _half_product(pair.narrow(0, 0, 1).expand(2, -1, -1), pair.mT).unbind()
    return whole.add_(mixed).add_(mixed.mT)


def _half_product(left: Tensor, right: Tensor) -> Tensor:
    """The float32 product of float16 matrices [b, n, k] and [b, k, m]."""
    if left.device.type == "cpu":  # for which PyTorch has no product of this kind
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)
