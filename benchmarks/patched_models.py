# SPDX-License-Identifier: Apache-2.0
"""genperf.patch on models of other libraries: times of the quantizer and of the whole model, and which indices change.

    python benchmarks/patched_models.py [-k WORDS] [--threads N] [--out benchmarks/results]

Weights are random, with codes spread as widely as the vectors that they are searched for. Rows whose library cannot be imported are
left out. Times are the shortest of several turns, in which the model as it came and its patched copy run by turns in one process.
Indices are compared with those of float64: of each search that the model as it came makes, repeated by the patched copy.
"""

import argparse
import copy
import dataclasses
import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from measure import TURNS, TURNS_OF_SLOW, in_turn, seconds_of
from modes import selected, write
from torch import Tensor, nn

import genperf


@dataclasses.dataclass(frozen=True)
class Search:
    """A method that searches codes.

    Attributes:
        method: its name; the last tensor of integers in what it returns are the indices.
        codes: the codes [K, D] of the module.
        channel: the dimension of the method's first argument that holds a vector.
    """

    method: str
    codes: Callable[[Any], Tensor]
    channel: int = -1
    metric: str = "euclidean"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and its calls.

    Attributes:
        make: returns the model, after an import of its library.
        size: what is measured, for the table.
        call: encodes and decodes, or what else the library calls its quantizer for.
        quantizer: path and method of the part whose time is told apart; None where the model is a quantizer.
        search: by class, how indices are found.
        loss: a scalar to differentiate, for a training step; None where upstream's quantizer does not train.
    """

    name: str
    size: str
    make: Callable[[], nn.Module]
    call: Callable[[Any], Any]
    quantizer: tuple[str, str] | None
    search: dict[str, Search]
    loss: Callable[[Any], Tensor] | None = None


def transformers(name: str, cls: str, config: str, **options: Any) -> nn.Module:
    package = f"transformers.models.{name}"
    configuration = getattr(importlib.import_module(f"{package}.configuration_{name}"), config)(**options)
    return getattr(importlib.import_module(f"{package}.modeling_{name}"), cls)(configuration)


def package(module: str, cls: str, *arguments: Any, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(module), cls)(*arguments, **options)


EMBED = Search("quantize", lambda module: module.embed)
IMAGES = Search("forward", lambda module: module.embedding.weight, channel=1)
COSINE = Search("decode_latents", lambda module: module.codebook.weight, channel=1, metric="cosine")
VQP = Search("forward", lambda module: module.codebook)


def rows() -> list[Row]:
    audio = torch.randn(1, 1, 2 * 24000)
    frames, wide = torch.randn(4, 128, 750), torch.randn(4, 512, 150)
    images, small = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 64, 64)
    speech = torch.randn(2, 300, 512)
    sequence = torch.randn(8, 512, 128)
    return [
        Row(
            "transformers EncodecModel",
            "24 kHz, 2 s, 6 kbit/s: 8 x 1024 codes of 128",
            lambda: transformers("encodec", "EncodecModel", "EncodecConfig"),
            lambda model: model.decode(*model.encode(audio, bandwidth=6.0)[:2]),
            ("quantizer", "encode"),
            {"EncodecEuclideanCodebook": EMBED},
        ),
        Row(
            "transformers MimiModel",
            "24 kHz, 2 s: 32 x 2048 codes of 256",
            lambda: transformers("mimi", "MimiModel", "MimiConfig"),
            lambda model: model.decode(model.encode(audio).audio_codes),
            ("quantizer", "encode"),
            {"MimiEuclideanCodebook": EMBED},
        ),
        Row(
            "transformers DacModel",
            "16 kHz, 1 s: 12 x 1024 codes of 8",
            lambda: transformers("dac", "DacModel", "DacConfig", n_codebooks=12, encoder_hidden_size=32, decoder_hidden_size=512),
            lambda model: model(audio[..., :16000]).audio_values,
            ("quantizer", "forward"),
            {"DacVectorQuantize": COSINE},
            lambda model: sum(t.sum() for t in model(audio[..., :16000])[:2]),
        ),
        Row(
            "transformers X-Codec, its quantizer",
            "4 x 150 frames: 8 x 1024 codes of 512",
            lambda: transformers("xcodec", "XcodecResidualVectorQuantization", "XcodecConfig", codebook_dim=512),
            lambda quantizer: quantizer.decode(quantizer.encode(wide, 4.0)),
            None,
            {"XcodecEuclideanCodebook": EMBED},
        ),
        Row(
            "transformers ChameleonVQVAE",
            "128 x 128 pixels: 8192 codes of 256",
            lambda: transformers("chameleon", "ChameleonVQVAE", "ChameleonVQVAEConfig", base_channels=64),
            lambda model: model.encode(images),
            ("quantize", "forward"),
            {"ChameleonVQVAEVectorQuantizer": IMAGES},
        ),
        Row(
            "transformers Wav2Vec2's quantizer",
            "2 x 300 frames: 2 x 320 codes of 128",
            lambda: transformers("wav2vec2", "Wav2Vec2GumbelVectorQuantizer", "Wav2Vec2Config"),
            lambda quantizer: quantizer(speech),
            None,
            {},
            lambda quantizer: sum(t.sum() for t in quantizer(speech)),
        ),
        Row(
            "diffusers VQModel",
            "64 x 64 pixels: 8192 codes of 4",
            lambda: package("diffusers", "VQModel", num_vq_embeddings=8192, latent_channels=4),
            lambda model: model(small).sample,
            ("quantize", "forward"),
            {"VectorQuantizer": IMAGES},
            lambda model: sum(t.sum() for t in (lambda out: (out.sample, out.commit_loss))(model(small))),
        ),
        Row(
            "diffusers AutoencoderKL",
            "64 x 64 pixels: moments [1, 8, 64, 64]",
            lambda: package("diffusers", "AutoencoderKL"),
            lambda model: model(small, sample_posterior=True).sample,
            None,
            {},
            lambda model: model.encode(small).latent_dist.kl().sum(),
        ),
        Row(
            "encodec ResidualVectorQuantizer",
            "4 x 750 frames: 8 x 1024 codes of 128",
            lambda: package("encodec.quantization", "ResidualVectorQuantizer", 128, 8, 1024, kmeans_init=False),
            lambda quantizer: quantizer.encode(frames, 75),
            None,
            {"EuclideanCodebook": EMBED},
            lambda quantizer: (lambda result: result.quantized.sum() + result.penalty)(quantizer(frames, 75)),
        ),
        Row(
            "descript-audio-codec ResidualVectorQuantize",
            "4 x 150 frames: 9 x 1024 codes of 8",
            lambda: package("dac.nn.quantize", "ResidualVectorQuantize", 512),
            lambda quantizer: quantizer(wide),
            None,
            {"VectorQuantize": COSINE},
            lambda quantizer: sum(t.sum() for t in (lambda out: (out[0], out[3], out[4]))(quantizer(wide))),
        ),
        Row(
            "moshi SplitResidualVectorQuantizer",
            "4 x 150 frames: 8 x 2048 codes of 256",
            lambda: package(
                "moshi.quantization.vq", "SplitResidualVectorQuantizer", dimension=256, input_dimension=512, output_dimension=512, bins=2048
            ),
            lambda quantizer: quantizer.encode(wide),
            None,
            {"EuclideanCodebook": Search("_quantize", lambda module: module.embedding)},
        ),
        Row(
            "taming VectorQuantizer",
            "[4, 256, 16, 16]: 1024 codes of 256",
            lambda: package("taming.modules.vqvae.quantize", "VectorQuantizer", 1024, 256, 0.25),
            lambda quantizer: quantizer(LATENTS),
            None,
            {"VectorQuantizer": IMAGES},
            lambda quantizer: sum(t.sum() for t in quantizer(LATENTS)[:2]),
        ),
        Row(
            "vector-quantize-pytorch VectorQuantize",
            "[8, 512, 128]: 1024 codes",
            lambda: package("vector_quantize_pytorch", "VectorQuantize", 128, 1024),
            lambda quantizer: quantizer(sequence),
            None,
            {"VectorQuantize": VQP},
            lambda quantizer: quantizer(sequence)[0].sum() + quantizer(sequence)[2].sum(),
        ),
        Row(
            "vector-quantize-pytorch ResidualVQ",
            "[8, 512, 128]: 8 x 1024 codes",
            lambda: package("vector_quantize_pytorch", "ResidualVQ", dim=128, num_quantizers=8, codebook_size=1024),
            lambda quantizer: quantizer(sequence),
            None,
            {"VectorQuantize": VQP},
            lambda quantizer: (lambda out: out[0].sum() + out[2].sum())(quantizer(sequence.requires_grad_())),
        ),
    ]


LATENTS = torch.randn(4, 256, 16, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of models of other libraries before and after genperf.patch.")
    parser.add_argument("-k", metavar="WORDS", help="only rows that match")
    parser.add_argument("--out", default="benchmarks/results", help="folder of patched_models.md")
    parser.add_argument("--name", help="another name of the page")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.set_defaults(quick=False)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = {row.name: row for row in rows()}
    lines = [measured(table[name]) for name in selected(table, arguments.k)]
    facts = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__, "isa": genperf._library.isa}
    page = PAGE.format(**facts, rows="\n".join(filter(None, lines)))
    return write(page, arguments, "patched_models")


PAGE = """# Models before and after `genperf.patch`

`python benchmarks/patched_models.py`, {threads} thread(s) at load {load:.0f}, torch {torch}, kernels of {isa}, float32, random weights.
Milliseconds before and after, the shortest of several turns, and their ratio. "Quantizer" is the part that is replaced, within the model
where there is a model around it; a training step is forward and backward. "Changed" are indices that patch changes, of all; "wrong" those
that are not float64's, before and after.

| model | size | quantizer | whole call | training step | changed | wrong |
|---|---|---|---|---|---|---|
{rows}
"""


def measured(row: Row) -> str | None:
    """A line of the table, or None if the library cannot be imported."""
    torch.manual_seed(0)
    try:
        model = row.make().eval()
    except (ImportError, OSError) as error:
        print(f"{row.name}: left out ({error})")
        return None
    with torch.no_grad():
        spread_codes(row, model)
    patched = copied(row, model)
    report = genperf.patch(patched)
    if not report.replaced:
        raise SystemExit(f"{row.name}: nothing was replaced\n{report}")
    with torch.no_grad():
        changed, total, wrong = count(row, model, patched)
        whole = times(lambda: row.call(patched), lambda: row.call(model), TURNS_OF_SLOW if row.quantizer else TURNS)
        part = quantizer_times(row, model, patched)
    step = ""
    if row.loss is not None:
        model.train()
        patched.train()
        step = times(lambda: row.loss(patched).backward(), lambda: row.loss(model).backward(), TURNS_OF_SLOW)
    indices = f"{changed} / {total}" if total else ""
    line = f"| {row.name} | {row.size} | {part or whole} | {whole if part else ''} | {step} | {indices} | {wrong if total else ''} |"
    print(line, flush=True)
    return line


def copied(row: Row, model: nn.Module) -> nn.Module:
    """A copy with the same weights; those of weight_norm allow no deepcopy once they were computed with a graph."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        other = row.make().eval()
        other.load_state_dict(model.state_dict())
        return other


def spread_codes(row: Row, model: nn.Module) -> None:
    """Draw codes with the mean and deviation of the vectors that they are searched for."""
    for module, calls in searches(row, model).items():
        if not calls:  # a quantizer beyond the bandwidth
            continue
        search = row.search[type(module).__name__]
        vectors, codes = calls[0][0].movedim(search.channel, -1).flatten(0, -2), search.codes(module)
        drawn = vectors.mean(0) + vectors.std(0) * torch.randn(codes.shape)
        sums = next((name for name in ("embed_sum", "embedding_sum") if hasattr(module, name)), None)
        if sums is None:
            codes.copy_(drawn)
            if hasattr(module, "embed_avg"):  # averages of a training that has begun: each code has three vectors
                module.embed_avg.copy_(3 * codes)
                module.cluster_size.fill_(3)
        else:  # Mimi's codes are sums divided by a usage, kept when they were first read
            getattr(module, sums).copy_(drawn)
            module.cluster_usage.fill_(1)
            module._embed = module._embedding = None


def searches(row: Row, model: nn.Module) -> dict[Any, list[tuple[Tensor, Tensor]]]:
    """What each search of a call was given, and the indices that it found, by module."""
    found: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for module in searching(row, model):
        calls = found[module] = []
        original = getattr(module, row.search[type(module).__name__].method)

        def recorded(x: Tensor, *more: Any, original: Any = original, calls: Any = calls, **options: Any) -> Any:
            result = original(x, *more, **options)
            calls.append((x, indices_of(result)))
            return result

        setattr(module, row.search[type(module).__name__].method, recorded)
    row.call(model)
    for module in found:
        delattr(module, row.search[type(module).__name__].method)
    return found


def searching(row: Row, model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ in row.search]


def count(row: Row, model: nn.Module, patched: nn.Module) -> tuple[int, int, str]:
    """How many indices differ, of how many, and how many of each are not those of float64."""
    changed = total = upstream_wrong = genperf_wrong = 0
    for (module, calls), twin in zip(searches(row, model).items(), searching(row, patched), strict=True):
        search = row.search[type(module).__name__]
        options = {"channel_dim": search.channel, "metric": search.metric, "impl": "reference"}
        for x, indices in calls:
            found = indices_of(getattr(twin, search.method)(x)).reshape(-1)
            exact = genperf.nearest_code(x.double(), search.codes(module).double(), **options).reshape(-1)
            changed += int((found != indices.reshape(-1)).sum())
            upstream_wrong += int((indices.reshape(-1) != exact).sum())
            genperf_wrong += int((found != exact).sum())
            total += exact.numel()
    return changed, total, f"{upstream_wrong} / {genperf_wrong}"


def indices_of(result: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(result)
    return next(leaf for leaf in reversed(leaves) if isinstance(leaf, Tensor) and not leaf.is_floating_point())


def quantizer_times(row: Row, model: nn.Module, patched: nn.Module) -> str:
    if row.quantizer is None:
        return ""
    path, method = row.quantizer
    module, twin = model.get_submodule(path), patched.get_submodule(path)
    seen: list[tuple[Any, Any]] = []
    original = getattr(module, method)
    setattr(module, method, lambda *a, **k: (seen.append((a, k)), original(*a, **k))[1])
    row.call(model)
    delattr(module, method)
    arguments, options = seen[0]
    return times(lambda: getattr(twin, method)(*arguments, **options), lambda: getattr(module, method)(*arguments, **options))


def times(after: Callable[[], object], before: Callable[[], object], rounds: int = TURNS) -> str:
    # Short calls have more turns, of which one should be undisturbed.
    patched, upstream = in_turn(after, before, max(rounds, min(60, int(1 / seconds_of(before)))))
    return f"{digits(upstream * 1e3)} / {digits(patched * 1e3)} = {upstream / patched:.2f}"


def digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


if __name__ == "__main__":
    raise SystemExit(main())
