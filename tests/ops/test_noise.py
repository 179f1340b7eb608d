# SPDX-License-Identifier: Apache-2.0
"""The noise of the ops that draw it: known answers, equality across implementations, and statistics at a fixed seed.

Every statistic below is compared with its distribution under true randomness at 4.5 standard deviations, two-sided 7e-6;
the draws are so many that an error of a fraction of a percent would show.
"""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import genperf
from genperf import testing
from genperf.ops import _noise

pytestmark = pytest.mark.compiled

ROOT = Path(__file__).parents[2]
SEED = 0x299F31D0A4093822
SIGMAS = 4.5
MILLION = 1 << 20


def native_normal(seed, rows, count, device):
    zero = torch.zeros(rows, 1, count, device=device)
    return torch.ops.genperf.gaussian_sample(zero, zero, None, None, None, _seed(seed, device), 0, 0.0, False)[0].reshape(rows, count)


def native_gumbel(seed, rows, count, device):
    """Each variate is the largest perturbed logit when all other logits are far below it."""
    noise = torch.empty(rows, count, device=device)
    for k in range(count):
        logits = torch.full((rows, count, 1), -1e4, device=device)
        logits[:, k] = 0
        noise[:, k] = torch.ops.genperf.gumbel_sample(logits, None, 1.0, None, _seed(seed, device), 0, True, False)[3][2].flatten()
    return noise


def native_uniform(seed, rows, count, device):
    zero, one = torch.zeros(rows, 1, count, device=device), torch.ones((), device=device)
    no_weight = torch.zeros(rows, device=device)
    return torch.ops.genperf.interpolate(zero, None, one, no_weight, _seed(seed, device), 0).reshape(rows, count)


def native_weights(seed, rows, device):
    one = torch.ones(rows, 1, 1, device=device)
    return torch.ops.genperf.interpolate(one, torch.zeros_like(one), None, None, _seed(seed, device), 0).flatten()


def _seed(seed, device):
    return torch.tensor(seed, dtype=torch.int64, device=device)


def assert_moments(x, moments):
    """Raw moments 1 to 4; the variance of the n-th is moment 2n minus the square of moment n."""
    x = x.double().flatten()
    for order in range(1, 5):
        spread = math.sqrt((moments[2 * order] - moments[order] ** 2) / x.numel())
        assert abs(x.pow(order).mean().item() - moments[order]) < SIGMAS * spread, f"moment {order}"


def assert_distribution(x, cdf):
    """Kolmogorov-Smirnov test: the distance times sqrt(n) exceeds 2.5 with probability 1 / 134,000."""
    probability = cdf(x.double().flatten().sort().values)
    n = probability.numel()
    steps = torch.arange(n + 1, dtype=torch.float64, device=x.device) / n
    distance = max((steps[1:] - probability).max().item(), (probability - steps[:-1]).max().item())
    assert distance * math.sqrt(n) < 2.5


def assert_uncorrelated(a, b, name):
    """The values, and their squares, which are correlated if two numbers share a radius."""
    for power in (1, 2):
        x, y = (t.double().flatten().pow(power) for t in (a, b))
        correlation = torch.corrcoef(torch.stack([x, y]))[0, 1].item()
        assert abs(correlation) * math.sqrt(x.numel()) < SIGMAS, f"{name}, power {power}: {correlation}"


def normal_cdf(x):
    return torch.special.ndtr(x)


def gumbel_cdf(x):
    return torch.exp(-torch.exp(-x))


NORMAL_MOMENTS = [1, 0, 1, 0, 3, 0, 15, 0, 105]
UNIFORM_MOMENTS = [1 / (order + 1) for order in range(9)]
# Raw moments of the standard Gumbel distribution, from its cumulants (n-1)! zeta(n).
_CUMULANTS = [0, 0.5772156649015329, *(math.factorial(n - 1) * z for n, z in enumerate(
    (math.pi**2 / 6, 1.2020569031595942, math.pi**4 / 90, 1.0369277551433699, math.pi**6 / 945, 1.0083492773819228, math.pi**8 / 9450), 2
))]  # fmt: skip
GUMBEL_MOMENTS = [1.0]
for _n in range(1, 9):
    GUMBEL_MOMENTS.append(sum(math.comb(_n - 1, m - 1) * _CUMULANTS[m] * GUMBEL_MOMENTS[_n - m] for m in range(1, _n + 1)))

DRAWS = {
    "normal": (native_normal, _noise.normal_noise, NORMAL_MOMENTS, normal_cdf),
    "gumbel": (native_gumbel, _noise.gumbel_noise, GUMBEL_MOMENTS, gumbel_cdf),
    "uniform": (native_uniform, _noise.uniform_noise, UNIFORM_MOMENTS, lambda x: x.clamp(0, 1)),
}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(counter, key, expected, device):
    """From Random123, the reference implementation of Philox."""

    def signed(low, high):
        return torch.tensor(low | high << 32, dtype=torch.uint64).view(torch.int64).to(device)

    words = _noise.random_words(signed(*key), signed(*counter[:2]), signed(*counter[2:]))
    assert tuple(words.tolist()) == expected


@pytest.mark.parametrize("name", DRAWS)
def test_native_noise_equals_the_reference(name, device):
    """float32 against float64: within 2e-6 for the normal (below 6.8) and the Gumbel (below 22.9), bitwise equal for the uniform."""
    native, reference, _, _ = DRAWS[name]
    for rows, count in [(1, 1), (3, 2), (5, 3), (2, 7), (9, 31), (33, 33), (2, 65)]:
        for seed in (0, SEED, 2**63 - 1):
            found = native(seed, rows, count, device)
            expected = reference(_seed(seed, device), rows, count, torch.float64)
            tolerance = {"normal": 2e-6, "gumbel": 2e-6, "uniform": 0}[name]
            assert (found - expected).abs().max() <= tolerance, (rows, count, seed)


def test_native_noise_equals_the_reference_in_long_rows(device):
    """Half a million normals, with radii out to 5 standard deviations."""
    found = native_normal(SEED, 3, 150_001, device)
    assert (found - _noise.normal_noise(_seed(SEED, device), 3, 150_001, torch.float64)).abs().max() <= 2e-6
    found = native_weights(SEED, 100_003, device)
    assert torch.equal(found, _noise.uniform_weights(_seed(SEED, device), 100_003))


@pytest.mark.once
@pytest.mark.parametrize("name", DRAWS)
def test_moments_and_distribution(name, device):
    native, _, moments, cdf = DRAWS[name]
    x = native(SEED, MILLION // 4, 16 if name != "gumbel" else 5, device)
    assert x.isfinite().all()
    assert_moments(x, moments)
    assert_distribution(x, cdf)
    for column in range(4):  # each of the four words of a quad
        assert_distribution(x[:, column], cdf)


@pytest.mark.unsanitized  # a million numbers: sanitizers see the accesses in the tests of equality and layouts
def test_weights_are_uniform_and_distinct(device):
    weights = native_weights(SEED, MILLION, device)
    assert weights.min() >= 0
    assert weights.max() < 1
    assert_moments(weights, UNIFORM_MOMENTS)
    assert_distribution(weights, lambda x: x)
    for lag in range(1, 9):
        assert_uncorrelated(weights[lag:], weights[:-lag], f"rows {lag} apart")
    assert_uncorrelated(weights, native_weights(SEED + 1, MILLION, device), "neighboring seeds")
    # 1000 draws of 2^24 values: 0.03 pairs are expected to be equal.
    assert len(weights[:1000].unique()) >= 999
    # The weights are independent of the noise of the same rows and seed.
    assert_uncorrelated(weights, native_uniform(SEED, MILLION, 1, device), "weight and noise")


@pytest.mark.once
@pytest.mark.parametrize("name", DRAWS)
def test_no_correlation(name, device):
    """Between neighbors in a row, in a column, and for seeds that differ in one bit of either half."""
    native = DRAWS[name][0]
    count = 8 if name == "gumbel" else 32
    x = native(SEED, MILLION // 32, count, device)
    for lag in range(1, min(9, count)):
        assert_uncorrelated(x[:, lag:], x[:, :-lag], f"{lag} apart in a row")
        assert_uncorrelated(x[lag:], x[:-lag], f"{lag} rows apart")
    # The four positions of a quad in pairs: a radius or an angle used twice would not show in the pairs of one lag.
    for i in range(4):
        for j in range(i):
            assert_uncorrelated(x[:, i::4], x[:, j::4], f"words {i} and {j}")
    for other in (SEED + 1, SEED ^ 1, SEED ^ 1 << 32, SEED ^ 1 << 62):
        assert_uncorrelated(x, native(other, MILLION // 32, count, device), f"seeds {SEED:x} and {other:x}")


@pytest.mark.unsanitized
def test_tails_of_the_normal(device):
    """The number of 10^7 draws beyond 3, 4 and 4.5 on either side, and the largest."""
    n = 10_000_000
    x = native_normal(SEED, 100, n // 100, device)
    for limit in (3.0, 4.0, 4.5):
        p = 0.5 * math.erfc(limit / math.sqrt(2))
        for count in ((x > limit).sum().item(), (x < -limit).sum().item()):
            assert abs(count - n * p) < SIGMAS * math.sqrt(n * p), limit
    # The largest lies below 4.8 with probability 1e-7, above 6.6 with 4e-4; nothing can lie above 6.8.
    assert 4.8 < x.abs().max() < 6.6


@pytest.mark.unsanitized
def test_tails_of_the_gumbel(device):
    x = native_gumbel(SEED, MILLION, 1, device)
    for limit in (5.0, 8.0):
        p = 1 - math.exp(-math.exp(-limit))
        assert abs((x > limit).sum().item() - MILLION * p) < SIGMAS * math.sqrt(MILLION * p)
    p = math.exp(-math.exp(2.0))
    assert abs((x < -2).sum().item() - MILLION * p) < SIGMAS * math.sqrt(MILLION * p)
    assert 10 < x.max() < 23
    assert -3.2 < x.min() < -2.3


@pytest.mark.unsanitized
def test_angles_of_neighboring_normals_are_uniform(device):
    """For the two numbers of a pair, and for two numbers of different pairs."""
    x = native_normal(SEED, MILLION // 4, 4, device).double()
    for i, j in ((0, 1), (2, 3), (1, 2), (0, 3)):
        angle = torch.atan2(x[:, j], x[:, i])
        assert_distribution(angle, lambda angle: angle / (2 * math.pi) + 0.5)
        # The squared length of two independent normals is exponential with mean 2.
        assert_distribution(x[:, i].square() + x[:, j].square(), lambda square: 1 - torch.exp(-square / 2))


@pytest.mark.unsanitized
def test_hard_samples_follow_the_softmax(device):
    """Pearson's chi-square test: 4.5 standard deviations with K - 1 degrees of freedom."""
    for k in (2, 5, 31):
        logits = torch.linspace(-1.5, 1.5, k, device=device)
        _, indices, _ = genperf.gumbel_sample(logits.expand(MILLION // 4, k), hard=True)
        expected = logits.double().softmax(0) * indices.numel()
        statistic = ((torch.bincount(indices, minlength=k) - expected).square() / expected).sum().item()
        assert abs(statistic - (k - 1)) < SIGMAS * math.sqrt(2 * (k - 1)) + 3, k


@pytest.mark.unsanitized
def test_soft_samples_have_logistic_log_ratios(device):
    """The log ratio of two categories is logistic."""
    soft, _, _ = genperf.gumbel_sample(torch.zeros(MILLION // 4, 2, device=device))
    assert_distribution(torch.logit(soft[:, 0].double()), torch.sigmoid)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 9), (2, 3, 7, 5), (2, 3, 3, 4, 5)], ids=str)
def test_a_seed_gives_the_same_noise_in_every_layout(shape, device):
    """The native op in each layout against the reference, up to rounding."""

    def draw(function, x, impl=None):
        torch.manual_seed(5)
        return function(x, impl)

    x = torch.randn(shape, device=device)
    for name, laid_out in testing.strided(x).items():
        for dim in range(len(shape)):
            for hard in (False, True):

                def gumbel(x, impl, dim=dim, hard=hard):
                    return genperf.gumbel_sample(x, dim=dim, hard=hard, impl=impl)

                found, expected = draw(gumbel, laid_out), draw(gumbel, x, "reference")
                assert torch.equal(found[1], expected[1]), (name, dim)
                torch.testing.assert_close(found[0], expected[0], rtol=4e-6, atol=1e-6, msg=f"gumbel {name} {dim}")
        for function in (
            lambda x, impl: genperf.gaussian_sample(torch.zeros_like(x), x * 0, impl=impl)[0],
            lambda x, impl: genperf.gaussian_sample(x, torch.zeros_like(x), impl=impl)[0],
            lambda x, impl: genperf.interpolate(x, -x, impl=impl),
            lambda x, impl: genperf.perturb(x, impl=impl),
        ):
            found, expected = draw(function, laid_out), draw(function, x, "reference")
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_seed_gives_the_same_noise_in_every_dtype(dtype, device):
    """Half precision rounds the same noise."""
    zero = torch.zeros(3, 41, device=device)
    results = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(5)
        results.append(genperf.gaussian_sample(zero.to(kind), zero.to(kind))[0])
    assert torch.equal(results[0].to(dtype), results[1])


HOST = r"""
#include <cstdio>
#include "noise.h"

using namespace genperf;

int main() {
  unsigned a, b, c, d;
  unsigned long long seed;
  while (std::scanf("%x %x %x %x %llx", &a, &b, &c, &d, &seed) == 5) {
    const Words<Scalar> words = random_words<Scalar>(a, b, c, d, seed);
    float normal[4];
    normals<Scalar>(words, normal);
    for (int i = 0; i < 4; ++i)
      std::printf("%u %a %a %a %a\n", words.word[i], uniform<Scalar>(words.word[i]), exponential<Scalar>(words.word[i]),
                  gumbel<Scalar>(words.word[i]), normal[i]);
  }
  // The ends of the range and the neighborhood of 1/2, where exponential changes its branch.
  const unsigned ends[] = {0u, 1u, 2u, 0x7fffffffu, 0x80000000u, 0x80000001u, 0xfffffffeu, 0xffffffffu, 0xb504f333u, 0x5a827999u};
  for (unsigned word : ends)
    std::printf("%u %a %a %a 0\n", word, uniform<Scalar>(word), exponential<Scalar>(word), gumbel<Scalar>(word));
}
"""


@pytest.fixture(scope="module")
def host_noise(tmp_path_factory):
    """Columns word, uniform, exponential, gumbel, normal of csrc/noise.h in scalar arithmetic, and the counters [n, 5] behind them."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("noise")
    (folder / "host.cpp").write_text(HOST)
    command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "host.cpp", "-o", "host"]
    subprocess.run(command, cwd=folder, check=True)
    generator = torch.Generator().manual_seed(1)
    counters = torch.randint(1 << 32, (20_000, 4), generator=generator)
    counters[:5] = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [7, 1 << 31, 9, 0], [(1 << 32) - 1] * 4])
    seeds = torch.randint(torch.iinfo(torch.int64).max, (len(counters),), generator=generator)
    seeds[:2] = torch.tensor([0, -1])
    lines = [
        " ".join(f"{number:x}" for number in (*counter, seed & (1 << 64) - 1))
        for counter, seed in zip(counters.tolist(), seeds.tolist(), strict=True)
    ]
    printed = subprocess.run(["./host"], cwd=folder, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    columns = list(zip(*(line.split() for line in printed.splitlines()), strict=True))
    words = torch.tensor([int(word) for word in columns[0]])
    return counters, seeds, words, *(torch.tensor([float.fromhex(v) for v in column], dtype=torch.float64) for column in columns[1:])


def ulps(found, exact):
    """Distance in float32 ulps at the exact value."""
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 23)
    return ((found - exact).abs() / spacing).max().item()


@pytest.mark.once
def test_host_words_and_uniforms_are_bitwise_equal(host_noise):
    counters, seeds, words, uniform, *_ = host_noise
    quad, row = (counters[:, i] | counters[:, i + 1] << 32 for i in (0, 2))
    expected = torch.stack([_noise.random_words(s, q, r) for s, q, r in zip(seeds[:50], quad[:50], row[:50], strict=True)])
    assert torch.equal(words[: 4 * 50].view(50, 4), expected)
    assert torch.equal(words[: 4 * len(seeds)].view(-1, 4), _noise.random_words(seeds, quad, row))
    assert torch.equal(uniform, _noise._uniform(words).double())


@pytest.mark.once
def test_host_variates_are_within_a_few_ulps(host_noise):
    """exponential, its log and the normal pairs in float32 against float64."""
    counters, _, words, _, exponential, gumbel, normal = host_noise
    exact = _noise.exponential_variate(words)
    assert ulps(exponential, exact) <= 4
    # Near 0 the logarithm inherits the relative error of its argument, which is absolute there.
    assert ((gumbel + exact.log()).abs() <= 4 * 2.0**-23 * exact.log().abs().clamp(min=1)).all()
    words, normal = (t[: 4 * len(counters)].view(-1, 4) for t in (words, normal))
    for i in (0, 2):
        radius = (2 * _noise.exponential_variate(words[:, i])).sqrt()
        angle = words[:, i + 1].double() * (2 * math.pi * 2.0**-32)
        for found, expected in ((normal[:, i], radius * angle.cos()), (normal[:, i + 1], radius * angle.sin())):
            # sin and cos keep their relative accuracy to the zeros on the axes, but float64's argument does not.
            assert ((found - expected).abs() <= 4 * 2.0**-23 * expected.abs() + 1e-15 * radius).all()
