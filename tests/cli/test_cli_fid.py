import errno
import importlib
import io
import json
import re
import sys
import tempfile
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import EpsImagePlugin, Image

from genperf import metrics
from genperf._errors import UserError
from genperf.cli.main import main
from genperf.fid.images import read_batches
from genperf.fid.sources import open_source
from genperf.training.data import load_images

PER_CLASS = 20  # images of each digit in each folder

EXTRACTORS = """
import pathlib
import torch
from torch import nn

class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(72, 16))
        self.head = nn.Linear(16, 10)
        weights = pathlib.Path(__file__).with_name("digits.pt")
        if weights.exists():
            self.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.body(images.mean(1, keepdim=True))

class NeedsArgument(nn.Module):
    def __init__(self, width):
        super().__init__()

seen = []

def record(images):
    seen.append(images.clone())
    return images.float().flatten(1)[:, :3] + torch.tensor([0.0, 1.0, 2.0], device=images.device)

def maps(images):
    return [Digits.shared.body[0](images.mean(1, keepdim=True))]

Digits.shared = Digits()
module = Digits.shared.eval()
not_callable = 3

def dictionary(images):
    return {"features": images}

def integers(images):
    return images.flatten(1).long()

def short(images):
    return images.flatten(1)[1:]

def infinite(images):
    return images.flatten(1) / 0

def pair(images):
    return images.flatten(1), images.flatten(1)

def precision(images):
    seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    return images.flatten(1)[:, 30:32]

def raising(images):
    raise RuntimeError("no such layer.\\nmore")

def interrupted(images):
    raise KeyboardInterrupt

def broken_factory():
    raise OSError("no weights")
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small are slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two folders with digits 0 to 4, one with 5 to 9, and a module with an extractor trained on other images of digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    root = tmp_path_factory.mktemp("fid")
    (root / "fid_extractors.py").write_text(EXTRACTORS)
    images = (digits.images * 15).astype(np.uint8)  # the range was [0, 16]
    labels = digits.target
    rank = np.array([(labels[:index] == label).sum() for index, label in enumerate(labels)])  # index within the class
    rest = rank >= 2 * PER_CLASS
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(str(root))
        module = importlib.import_module("fid_extractors")
        torch.manual_seed(0)
        train(module.Digits(), images[rest][:500], labels[rest][:500], root / "digits.pt")
        del sys.modules["fid_extractors"]
    for name, chosen in {
        "low": (labels < 5) & (rank < PER_CLASS),
        "low_again": (labels < 5) & ~rest & (rank >= PER_CLASS),
        "high": (labels >= 5) & (rank < PER_CLASS),
    }.items():
        (root / name / "more").mkdir(parents=True)
        for number, image in enumerate(images[chosen]):
            folder = root / name if number % 2 else root / name / "more"
            Image.fromarray(image).save(folder / f"{number:03}.png")
    return root


def train(model, images, labels, path):
    """Train with gradient descent and save the weights."""
    images, labels = torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model.head(model.body(images).relu()), labels)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            parameter.data -= gradient
    assert loss < 0.5
    torch.save(model.state_dict(), path)


@pytest.fixture
def extractors(world, monkeypatch):
    """The module of the extractors, freshly imported."""
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.delitem(sys.modules, "fid_extractors", raising=False)
    yield importlib.import_module("fid_extractors")
    sys.modules.pop("fid_extractors", None)


def fid(*arguments):
    return main(["fid", "--device", "cpu", *map(str, arguments)])


def fid_json(capsys, *arguments):
    assert fid("--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


DIGITS = ("--extractor", "fid_extractors:Digits")


def files(folder):
    return sorted(folder.rglob("*.png"))


def features_of(extractors, folder):
    """Features computed directly from the files, float64 [N, 16]."""
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files(folder)])
    with torch.no_grad():
        return extractors.Digits().eval()(images[:, None].repeat(1, 3, 1, 1).float() / 255).double().numpy()


def statistics_of(features, correction=1):
    return features.mean(0), np.cov(features, rowvar=False, ddof=correction)


def direct_terms(mean1, cov1, mean2, cov2):
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return np.square(mean1 - mean2).sum(), np.trace(cov1 + cov2 - 2 * root)


def assert_fails(capsys, arguments, sentence, folder=None):
    """The command fails with code 2 and one sentence after the progress bars; it prints no result and writes no file."""
    before = folder and sorted(folder.rglob("*"))
    capsys.readouterr()
    assert fid(*arguments) == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert re.search(sentence, last), last
    assert re.fullmatch(r"genperf: .*\.", last), last
    assert printed.out == ""
    assert before is None or before == sorted(folder.rglob("*"))


def test_distance_of_folders_of_digits(world, extractors, capsys):
    results = {}
    for name in ("low_again", "high"):
        result = fid_json(capsys, world / "low", world / name, *DIGITS)
        means, traces = direct_terms(
            *statistics_of(features_of(extractors, world / "low")), *statistics_of(features_of(extractors, world / name))
        )
        assert result["distance"] == pytest.approx(means + traces, rel=1e-6)
        assert result["mean_term"] == pytest.approx(means, rel=1e-6)
        assert result["trace_term"] == pytest.approx(traces, rel=1e-5)
        assert result["n"] == [5 * PER_CLASS] * 2
        assert result["d"] == 16
        assert result["files"] == [str(world / "low"), str(world / name)]
        assert result["extractor"] == "fid_extractors:Digits"
        assert result["biased"] is False
        assert result["seconds"] > 0
        results[name] = result["distance"]
    assert 0 < 3 * results["low_again"] < results["high"]
    assert fid_json(capsys, world / "low", world / "low", *DIGITS)["distance"] == pytest.approx(0, abs=1e-6 * results["high"])


def test_batches_and_threads_change_nothing(world, extractors, capsys):
    expected = fid_json(capsys, world / "low", world / "high", *DIGITS)["distance"]
    for options in (("--batch-size", 7, "--workers", 1), ("--batch-size", 1000, "--workers", 5), ("--batch-size", 1, "--workers", 3)):
        assert fid_json(capsys, world / "low", world / "high", *DIGITS, *options)["distance"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("other", [(), ("mu_s", "sigma_s"), ("avg_mu", "avg_sigma")])
def test_statistics_files(world, extractors, tmp_path, capsys, other):
    sides = []
    for name in ("low", "high"):
        mean, cov = statistics_of(features_of(extractors, world / name))
        np.savez(tmp_path / f"{name}.npz", mu=mean, sigma=cov, **{key: np.ones((16, 16)[: 2 - key.count("mu")]) for key in other})
        sides += [mean, cov]
    result = fid_json(capsys, tmp_path / "low.npz", tmp_path / "high.npz")
    assert result["distance"] == pytest.approx(sum(direct_terms(*sides)), rel=1e-6)
    assert result["n"] == [None, None]
    assert result["extractor"] is None
    mixed = fid_json(capsys, world / "low", tmp_path / "high.npz", *DIGITS)
    assert mixed["distance"] == pytest.approx(result["distance"], rel=1e-5)
    assert mixed["n"] == [5 * PER_CLASS, None]


def test_text(world, extractors, capsys):
    result = fid_json(capsys, world / "low", world / "high", *DIGITS, "--kid", "--precision-recall")
    assert fid(world / "low", world / "high", *DIGITS, "--kid", "--precision-recall") == 0
    printed = capsys.readouterr()
    shown = {line[:17].strip(): line[17:] for line in printed.out.splitlines()}
    assert float(shown["Frechet distance"]) == pytest.approx(result["distance"], rel=1e-5)
    assert float(shown["of means"]) == pytest.approx(result["mean_term"], rel=1e-5)
    assert float(shown["of covariances"]) == pytest.approx(result["trace_term"], rel=1e-5)
    assert float(shown["KID"].split(",")[0]) == pytest.approx(result["kid"]["mean"], rel=1e-4)
    for name in ("precision", "recall", "density", "coverage"):
        assert shown[name] == f"{result[name]:.4f}"
    assert shown["B"] == f"{5 * PER_CLASS} samples of 16 features, {world / 'high'}"
    assert "image" in printed.err  # the progress bar


@pytest.mark.parametrize(
    ("name", "key", "dtype"),
    [
        ("a.npy", None, np.float32),
        ("a.npy", None, ">f8"),
        ("a.npz", "features", np.float32),
        ("a.npz", "feats", np.float64),
        ("a.npz", "any", ">f4"),
    ],
)
def test_feature_arrays(world, extractors, tmp_path, capsys, name, key, dtype):
    features = features_of(extractors, world / "low").astype(dtype)
    if key is None:
        np.save(tmp_path / name, features)
    else:
        extra = {} if key == "any" else {"labels": np.arange(3)}
        np.savez(tmp_path / name, **{key: features}, **extra)
    result = fid_json(capsys, tmp_path / name, world / "high", *DIGITS)
    low, high = (statistics_of(features_of(extractors, world / side)) for side in ("low", "high"))
    assert result["distance"] == pytest.approx(sum(direct_terms(*low, *high)), rel=1e-6)
    assert result["n"] == [5 * PER_CLASS] * 2


@pytest.mark.parametrize(("name", "shape"), [("a.npy", (8, 8)), ("images.npz", (8, 8, 1)), ("arr_0.npz", (8, 8, 3))])
def test_image_arrays(world, extractors, tmp_path, capsys, name, shape):
    images = np.stack([np.array(Image.open(path)) for path in files(world / "low")])
    images = np.repeat(images[..., None], 3, -1) if shape[-1] == 3 else images.reshape(-1, *shape)
    if name == "a.npy":
        np.save(tmp_path / name, images)
    else:
        np.savez(tmp_path / name, **{name[:-4]: images, "labels": np.arange(3)})
    expected = fid_json(capsys, world / "low", world / "high", *DIGITS)
    result = fid_json(capsys, tmp_path / name, world / "high", *DIGITS)
    assert result["distance"] == expected["distance"]


@pytest.mark.parametrize(("save", "order"), [(np.savez, "C"), (np.savez_compressed, "C"), (np.savez, "F")])
def test_images_in_archives_are_read_row_by_row(tmp_path, save, order):
    images = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    save(tmp_path / "lone.npz", np.asarray(images, order=order))
    save(tmp_path / "named.npz", labels=np.arange(3), images=np.asarray(images, order=order))
    for name in ("lone", "named"):
        tracemalloc.start()
        batches = read_batches(open_source(str(tmp_path / f"{name}.npz")).images, name, batch_size=8, channels=3, size=None, workers=2)
        for number, batch in enumerate(batches):
            assert np.array_equal(batch.movedim(1, -1), images[8 * number :][:8])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert number == 24
        # In Fortran order rows are not contiguous, and the whole array is read into memory once.
        assert peak < images.nbytes * (0.6 if order == "C" else 1.6)


def test_statistics_next_to_images(tmp_path, capsys):
    """As in the reference batches of guided-diffusion."""
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "b.npz", mu=np.full(4, 2.0), sigma=np.eye(4))
    result = fid_json(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert result["n"] == [None, None]
    assert result["distance"] == pytest.approx(16)


def test_scores_must_be_finite(tmp_path, capsys):
    features = np.random.default_rng(0).normal(size=(9, 4))
    np.save(tmp_path / "a.npy", features)
    np.save(tmp_path / "b.npy", features * 1e100)
    np.save(tmp_path / "c.npy", features * 1e200)
    np.savez(tmp_path / "d.npz", mu=np.full(4, 1e200), sigma=np.eye(4))
    for other in ("c.npy", "d.npz"):
        for options in ((), ("--json",)):
            sentence = f"'.*a.npy' and '.*{other}' must be small enough for a finite distance"
            assert_fails(capsys, [tmp_path / "a.npy", tmp_path / other, *options], sentence)
    assert_fails(capsys, [tmp_path / "a.npy", tmp_path / "b.npy", "--kid"], "must be small enough for a finite kid")
    assert_fails(capsys, ["--save-stats", tmp_path / "e.npz", tmp_path / "c.npy"], "cannot be written: cov must be finite", tmp_path)


def test_extractors_run_without_tf32(world, extractors, tmp_path):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for number, chosen in enumerate([("high", True), ("medium", True), ("highest", False)]):
            torch.set_float32_matmul_precision(chosen[0])
            torch.backends.cudnn.allow_tf32 = chosen[1]
            assert fid("--save-stats", tmp_path / f"{number}.npz", world / "low", "--extractor", "fid_extractors:precision") == 0
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == chosen
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert len(extractors.seen) >= 6
    assert set(extractors.seen) == {("highest", False)}


@pytest.mark.parametrize("biased", [False, True])
def test_saved_statistics(world, extractors, tmp_path, capsys, biased):
    options = (*DIGITS, *(["--biased"] if biased else []))
    out = tmp_path / "low.npz"
    result = fid_json(capsys, "--save-stats", out, world / "low", *options)
    assert result["saved"] == str(out)
    assert result["n"] == [5 * PER_CLASS]
    assert result["d"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["low.npz"]
    mean, cov = statistics_of(features_of(extractors, world / "low"), correction=0 if biased else 1)
    with np.load(out) as arrays:  # as pytorch-fid reads it
        np.testing.assert_allclose(arrays["mu"][:], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(arrays["sigma"][:], cov, rtol=1e-5, atol=1e-6)
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    direct = fid_json(capsys, world / "low", world / "high", *options)
    assert fid_json(capsys, out, world / "high", *options)["distance"] == pytest.approx(direct["distance"], rel=1e-9)
    assert fid("--save-stats", tmp_path / "again.npz", world / "low", *options) == 0
    assert f"written          {tmp_path / 'again.npz'}" in capsys.readouterr().out


def test_kernel_inception_distance(world, extractors, capsys):
    low, high = (features_of(extractors, world / side) for side in ("low", "high"))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(low)
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (low, high))
    expected = within - 2 * kernel(low, high).mean()
    # Subsets of all samples are identical.
    kid = fid_json(capsys, world / "low", world / "high", *DIGITS, "--kid", "--kid-subsets", 2)["kid"]
    assert kid["mean"] == pytest.approx(expected, rel=1e-4)
    assert kid["std"] == pytest.approx(0, abs=1e-5 * expected)
    assert kid["subset_size"] == n
    options = ("--kid", "--kid-subsets", 20, "--kid-subset-size", 50)
    first, again, other = (fid_json(capsys, world / "low", world / "high", *DIGITS, *options, "--seed", seed)["kid"] for seed in (1, 1, 2))
    assert first == again
    assert first["mean"] != other["mean"]
    assert abs(first["mean"] - expected) < 4 * first["std"]


@pytest.mark.parametrize("k", [2, 4])
def test_precision_and_recall(world, extractors, capsys, k):
    low, high = (features_of(extractors, world / side) for side in ("low", "high"))

    def covered(points, support):
        """Share of `points` within the k-th-neighbor radius of a point of `support`."""
        radii = np.sort(np.linalg.norm(support[:, None] - support[None], axis=-1), axis=1)[:, k]
        return (np.linalg.norm(points[:, None] - support[None], axis=-1) <= radii).any(1).mean()

    result = fid_json(capsys, world / "low", world / "high", *DIGITS, "--precision-recall", "--neighbors", k)
    assert result["precision"] == pytest.approx(covered(high, low), abs=1.01 / (5 * PER_CLASS))
    assert result["recall"] == pytest.approx(covered(low, high), abs=1.01 / (5 * PER_CLASS))
    assert 0 < result["precision"] < 1


@pytest.mark.parametrize(
    ("options", "dtype", "channels", "expected"),
    [
        ((), torch.float32, 3, lambda pixels: pixels / 255),
        (("--pixels", "signed"), torch.float32, 3, lambda pixels: pixels / 127.5 - 1),
        (("--pixels", "uint8"), torch.uint8, 3, lambda pixels: pixels),
        (("--pixels", "unit", "--channels", "1"), torch.float32, 1, lambda pixels: pixels / 255),
    ],
)
def test_input_of_the_extractor(extractors, tmp_path, capsys, options, dtype, channels, expected):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    modes = ("RGB", "L", "P", "RGBA")
    (tmp_path / "images").mkdir()
    for number, mode in enumerate(modes):
        Image.fromarray(rgb[number]).convert(mode).save(tmp_path / "images" / f"{number}.png")
    fid_json(capsys, tmp_path / "images", tmp_path / "images", "--extractor", "fid_extractors:record", "--batch-size", 3, *options)
    seen = extractors.seen
    assert [list(batch.shape) for batch in seen] == [[3, channels, 6, 5], [1, channels, 6, 5]] * 2
    assert all(batch.dtype == dtype for batch in seen)
    mode = "RGB" if channels == 3 else "L"
    for number, image in enumerate(torch.cat(seen[:2])):
        with Image.open(tmp_path / "images" / f"{number}.png") as file:
            pixels = torch.from_numpy(np.array(file.convert(mode))).reshape(6, 5, channels).permute(2, 0, 1)
        torch.testing.assert_close(image, expected(pixels).to(dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "wanted"), [("12", (12, 12)), ("7x12", (7, 12))])
def test_resizing(world, extractors, tmp_path, capsys, size, wanted):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (path, its_size) in enumerate(zip(files(world / "low"), [(8, 8), (20, 30), wanted], strict=False)):
        Image.open(path).resize(its_size).save(folder / f"{number}.png")
    fid_json(capsys, folder, folder, "--extractor", "fid_extractors:record", "--pixels", "uint8", "--size", size)
    assert list(extractors.seen[0].shape) == [3, 3, wanted[1], wanted[0]]
    for image, path in zip(extractors.seen[0], files(folder), strict=True):
        resized = Image.open(path).convert("RGB").resize(wanted, Image.Resampling.BICUBIC)
        assert np.array_equal(image.permute(1, 2, 0), np.array(resized))


@pytest.mark.parametrize("name", ["Digits", "module", "module.forward"])
def test_factories_modules_and_functions(world, extractors, capsys, name):
    expected = fid_json(capsys, world / "low", world / "high", *DIGITS)
    result = fid_json(capsys, world / "low", world / "high", "--extractor", f"fid_extractors:{name}")
    assert result["distance"] == expected["distance"]


def test_feature_maps_are_averaged(world, extractors, capsys):
    result = fid_json(capsys, world / "low", world / "high", "--extractor", "fid_extractors:maps")
    sides = []
    for name in ("low", "high"):
        images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files(world / name)])
        with torch.no_grad():
            sides += statistics_of(extractors.module.body[0](images[:, None] / 255).double().mean((2, 3)).numpy())
    assert result["d"] == 8
    assert result["distance"] == pytest.approx(sum(direct_terms(*sides)), rel=1e-5)


def test_too_few_samples_warn(tmp_path, capsys):
    features = np.random.default_rng(0).normal(size=(9, 8))
    np.save(tmp_path / "enough.npy", features)
    np.save(tmp_path / "few.npy", features[:8])
    assert fid(tmp_path / "enough.npy", tmp_path / "few.npy") == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert re.search(r"^genperf: 8 samples of 8 features in '.*few.npy' have a singular covariance", warnings[0])


def test_interrupt_writes_nothing(world, extractors, tmp_path, capsys):
    assert fid("--save-stats", tmp_path / "a.npz", world / "low", "--extractor", "fid_extractors:interrupted") == 130
    assert capsys.readouterr().err.endswith("genperf: interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(world, extractors, tmp_path, monkeypatch, capsys):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez", fail)
    assert_fails(capsys, ["--save-stats", tmp_path / "a.npz", world / "low", *DIGITS], "cannot be written: the disk is full", tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Digits", "must be inception or module.path:callable, got 'Digits'"),
        ("fid_extractors:", "must be inception or module.path:callable"),
        ("no_such_module:Digits", "'no_such_module:Digits' cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("fid_extractors:Letters", "cannot be imported: AttributeError: .*Letters"),
        ("fid_extractors:not_callable", "must be a callable that maps images to features, got 3"),
        ("fid_extractors:NeedsArgument", "must be a callable"),
        ("fid_extractors:broken_factory", "cannot be called without arguments: OSError: no weights"),
        ("fid_extractors:raising", r"failed on images \[64, 3, 8, 8\]: RuntimeError: no such layer\.$"),
        ("fid_extractors:dictionary", "'fid_extractors:dictionary': features must be a tensor, got dict"),
        ("fid_extractors:integers", "'fid_extractors:integers': features must .*, got torch.int64"),
        ("fid_extractors:torch.ravel", r"features must have shape \[N, d\] or \[B, d, H, W\], got \[12288\]"),
        ("fid_extractors:short", r"must return features of every image, got \[63, 192\] for images \[64, 3, 8, 8\]"),
        ("fid_extractors:pair", "must return one tensor of features, got 2 outputs"),
        ("fid_extractors:infinite", "'fid_extractors:infinite': features must be finite, got NaN or infinity in 64 of 64"),
    ],
)
def test_invalid_extractors(world, extractors, tmp_path, capsys, name, sentence):
    assert_fails(capsys, ["--save-stats", tmp_path / "a.npz", world / "low", "--extractor", name], sentence, tmp_path)


def test_extractors_are_found_in_the_current_folder(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "fid_extractors", raising=False)
    try:
        assert fid_json(capsys, "low", "high", *DIGITS)["files"] == ["low", "high"]
    finally:
        sys.modules.pop("fid_extractors", None)


@pytest.fixture
def torch_fidelity(monkeypatch, tmp_path):
    """A stand-in for the package with its signature, whose weights are two numbers."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__()
            assert features_list == ["2048"]
            self.scale = torch.nn.Parameter(torch.ones(2))
            self.load_state_dict(torch.load(feature_extractor_weights_path or cached, weights_only=True))

        def forward(self, images):
            assert images.dtype == torch.uint8
            assert images.shape[1] == 3
            return (images.float().flatten(1)[:, 20:22] * self.scale,)

    url = "https://example.org/weights-inception.pth"
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    vars(package.feature_extractor_inceptionv3).update(URL_INCEPTION_V3=url, FeatureExtractorInceptionV3=FeatureExtractorInceptionV3)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", package.feature_extractor_inceptionv3)
    return cached


def test_inception(world, torch_fidelity, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save({"scale": torch.tensor([1.0, 2.0])}, weights)
    result = fid_json(capsys, world / "low", world / "high", "--weights", weights)
    assert result["extractor"] == "inception"
    assert result["d"] == 2
    pixels = [np.stack([np.array(Image.open(path)).ravel()[20:22] for path in files(world / side)]) for side in ("low", "high")]
    expected = sum(direct_terms(*statistics_of(pixels[0] * [1.0, 2.0]), *statistics_of(pixels[1] * [1.0, 2.0])))
    assert result["distance"] == pytest.approx(expected, rel=1e-6)
    torch_fidelity.parent.mkdir(parents=True)
    weights.rename(torch_fidelity)
    assert fid(world / "low", world / "high") == 0
    assert "downloads" not in capsys.readouterr().err


def test_inception_errors(world, torch_fidelity, tmp_path, monkeypatch, capsys):
    def fails(sentence, *options):
        assert_fails(capsys, ["--save-stats", tmp_path / "a.npz", world / "low", *options], sentence, tmp_path)

    fails("the Inception weights from https://example.org/weights-inception.pth cannot be loaded: FileNotFoundError")
    fails("--weights must be a file, got '.*none.pth'", "--weights", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    fails("the Inception weights from '.*text.pth' cannot be loaded: ", "--weights", tmp_path / "text.pth")
    fails("--weights are those of --extractor inception, got --extractor fid_extractors:Digits", "--weights", "a", *DIGITS)
    fails("--pixels must be uint8 for --extractor inception, got signed", "--pixels", "signed")
    fails("takes images of 3 channels, got --channels 1", "--channels", "1")
    assert fid(world / "low", world / "high") == 2
    note = f"genperf: torch-fidelity downloads its Inception weights from https://example.org/weights-inception.pth to {torch_fidelity}."
    assert note in capsys.readouterr().err.splitlines()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    fails("--extractor inception needs the package torch-fidelity .*; install it with `pip install 'genperf\\[fid\\]'`, or name another")


def test_invalid_images(world, extractors, tmp_path, capsys):
    folder, out = tmp_path / "images", tmp_path / "out.npz"

    def fails(sentence, *options):
        assert_fails(capsys, ["--save-stats", out, folder, *DIGITS, *options], sentence, tmp_path)

    fails("got '.*images', which does not exist")
    folder.mkdir()
    fails("'.*images' must hold images, but no file in it has the suffix of an image")
    (folder / "notes.txt").write_text("no image")
    fails("no file in it has the suffix of an image")
    image = Image.open(files(world / "low")[0])
    image.save(folder / "0.png")
    fails("a covariance needs at least 2 samples, got 1 in '.*images'")
    image.resize((9, 8)).save(folder / "1.png")
    fails(r"one size unless --size gives it, got 8x8 in '.*0\.png' and 9x8 in '.*1\.png'")
    for content in ((folder / "0.png").read_bytes()[:45], b"no image", b""):
        (folder / "1.png").write_bytes(content)
        fails(r"the image '.*1\.png' cannot be read")
        fails(r"the image '.*1\.png' cannot be read", "--batch-size", "1", "--workers", "1")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "1.png")
    fails(r"8 bits per channel, got '.*1\.png' of mode I;16")


def test_photos_are_upright_unless_told_otherwise(extractors, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png", exif=exif)
    record = ("--extractor", "fid_extractors:record", "--pixels", "uint8")
    for options, expected in (((), np.rot90(pixels, -1, (1, 2))), (("--exif",), np.rot90(pixels, -1, (1, 2))), (("--no-exif",), pixels)):
        extractors.seen.clear()
        fid_json(capsys, tmp_path / "images", tmp_path / "images", *record, *options)
        assert np.array_equal(extractors.seen[0].movedim(1, -1), expected)


def test_zip_of_images(world, extractors, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "low.zip", "w") as archive:
        for path in files(world / "low"):
            archive.write(path, path.relative_to(world).as_posix())
        archive.writestr("low/._000.png", b"resource fork")
    expected = fid_json(capsys, world / "low", world / "high", *DIGITS)
    result = fid_json(capsys, tmp_path / "low.zip", world / "high", *DIGITS)
    assert result["distance"] == expected["distance"]
    assert result["n"] == expected["n"]
    with zipfile.ZipFile(tmp_path / "broken.zip", "w") as archive:
        for number in range(5000):
            archive.writestr(f"{number}.png", b"x")
    assert_fails(
        capsys, [tmp_path / "broken.zip", world / "low", *DIGITS], r"the image '.*broken\.zip/0\.png' cannot be read: cannot identify"
    )
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("a.txt", b"text")
    assert_fails(capsys, [tmp_path / "text.zip", world / "low", *DIGITS], r"'.*text\.zip' must hold images or arrays")


def test_images_with_channels_first(world, extractors, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((20, 3, 8, 8), np.uint8))
    sentence = r"a\.npy must hold images \[N, H, W\] or \[N, H, W, 1 or 3\], with the channels last, got \[20, 3, 8, 8\]"
    assert_fails(capsys, [tmp_path / "a.npy", world / "low", *DIGITS], sentence)


def test_empty_input():
    with pytest.raises(UserError, match="an input must be the path of a file or folder, got ''"):
        open_source("")


def test_statistics_that_cannot_be_written_are_kept(world, extractors, tmp_path, monkeypatch, capsys):
    save = metrics.save_statistics

    def full(path, *arguments):
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, *arguments)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(metrics, "save_statistics", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert fid("--save-stats", tmp_path / "a.npz", world / "low", *DIGITS) == 2
    (kept,) = (tmp_path / "temporary").iterdir()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"genperf: --save-stats '{tmp_path / 'a.npz'}' cannot be written: No space left on device; ")
    assert last.endswith(f"; the statistics are in '{kept}' instead.")
    assert fid_json(capsys, kept, world / "low", *DIGITS)["distance"] == pytest.approx(0, abs=1e-5)


def test_no_image_starts_ghostscript(world, extractors, tmp_path, monkeypatch, capsys):
    def field(tag, data):
        return bytes([0x1C, *tag]) + len(data).to_bytes(2, "big") + data

    folder, calls = tmp_path / "images", tmp_path / "calls"
    folder.mkdir()
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho $* >>'{calls}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("L", (8, 8)).save(eps := io.BytesIO(), "EPS")
    header = {(3, 20): b"\0\x08", (3, 30): b"\0\x08", (3, 60): b"\1\0", (3, 120): b"\5"}
    iptc = b"".join(field(tag, data) for tag, data in header.items()) + field((8, 10), eps.getvalue())
    Image.open(files(world / "low")[0]).save(folder / "0.png")
    for content in (eps.getvalue(), iptc):
        (folder / "1.png").write_bytes(content)
        assert_fails(capsys, [folder, world / "low", *DIGITS], r"the image '.*1\.png' cannot be read: cannot identify")
        with pytest.raises(UserError, match=r"the image '.*1\.png' cannot be read: cannot identify"):
            load_images(str(folder))
    assert not calls.exists()
    with Image.open(eps) as image, pytest.raises(OSError, match="cannot identify"):  # the script leaves an empty file
        image.load()
    assert calls.exists()


def test_other_files_are_ignored(world, extractors, tmp_path, capsys):
    for number, path in enumerate(files(world / "low")[:3]):
        Image.open(path).save(tmp_path / f"{number}.png")
    for name in ("paper.pdf", "a.eps", "a.ps", "a.mpo", "a.h5", "a.mpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"no image")
    assert fid_json(capsys, tmp_path, world / "low", *DIGITS)["n"][0] == 3
    assert load_images(str(tmp_path)).images.shape == (3, 1, 8, 8)


def test_invalid_files(world, extractors, tmp_path, capsys):
    mean, cov = np.zeros(16), np.eye(16)

    def fails(sentence, *options):
        assert_fails(capsys, [path, world / "low", *DIGITS, *options], sentence, tmp_path)

    def arrays(**named):
        np.savez(tmp_path / "a.npz", **named)
        return tmp_path / "a.npz"

    path = tmp_path / "none.npz"
    fails("got '.*none.npz', which does not exist")
    path = tmp_path / "text.npz"
    path.write_text("no archive")
    fails("text.npz")
    whole = arrays(mu=mean, sigma=cov).read_bytes()
    path = tmp_path / "half.npz"
    path.write_bytes(whole[: len(whole) // 2])
    fails("half.npz")
    path = tmp_path / "a.npz"
    arrays(mu=mean, labels=cov)
    fails("a.npz must hold 'mu' and 'sigma', got the names labels, mu")
    arrays(mu=mean, sigma=cov[:15])
    fails(r"a.npz: .*\[d\] and \[d, d\], got \[16\] and \[15, 16\]")
    arrays(mu=mean, sigma=cov * np.nan)
    fails("a.npz: sigma must be finite")
    arrays(mu=mean, sigma=cov - 0.5)
    fails("the statistics in '.*a.npz' cannot be used: cov must be positive semi-definite")
    assert_fails(capsys, [world / "low", path, *DIGITS], "the statistics in '.*a.npz' cannot be used", tmp_path)
    arrays(mu=mean[:8], sigma=cov[:8, :8])
    fails("features of one dimension, got 8 in '.*a.npz' and 16 in '.*low'")
    arrays(features=np.zeros((5, 8), np.float32))
    fails("features of one dimension, got 8 in '.*a.npz' and 16 in '.*low'")
    arrays(features=np.zeros((1, 16)))
    fails("a covariance needs at least 2 samples, got 1 in '.*a.npz'")
    arrays(features=np.full((3, 16), np.inf))
    fails("the features of '.*a.npz' cannot be used: features must be finite")
    arrays(features=np.zeros((3, 16), int))
    fails("a.npz must hold features, floats .*, got int64")
    arrays(images=np.zeros((3, 8, 8, 2), np.uint8))
    fails("a.npz must hold .*, got")
    archive = arrays(images=np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)).read_bytes()
    path.write_bytes(archive[:15000] + bytes(100) + archive[15100:])
    fails("the array 'images' in '.*a.npz' cannot be read: Bad CRC-32")
    arrays(features=np.array([None]))
    fails("a.npz .*cannot be read")
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path)
    fails("a.png .*cannot be read")


def test_invalid_options(world, extractors, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", mu=np.zeros(16), sigma=np.eye(16))
    np.save(tmp_path / "three.npy", np.random.default_rng(0).normal(size=(3, 16)))
    low, statistics = world / "low", tmp_path / "a.npz"

    def fails(sentence, *arguments):
        assert_fails(capsys, [*arguments, *DIGITS], sentence, tmp_path)

    fails("two inputs are needed, or one with --save-stats, got one", low)
    fails("--save-stats takes one input, got two", low, low, "--save-stats", tmp_path / "b.npz")
    fails(
        "--save-stats takes one input and computes no distance, got it with --kid and --precision-recall",
        low,
        "--save-stats",
        tmp_path / "b.npz",
        "--kid",
        "--precision-recall",
    )
    fails("features or images are needed for --save-stats, got the statistics file", statistics, "--save-stats", tmp_path / "b.npz")
    fails("features or images are needed for --kid, got the statistics file '.*a.npz'", low, statistics, "--kid")
    fails("features or images are needed for --precision-recall, got", statistics, low, "--precision-recall")
    fails("--neighbors 3 needs at least 4 samples, got 3 in '.*three.npy'", tmp_path / "three.npy", low, "--precision-recall")
    for path in (statistics, tmp_path / "b.npy", tmp_path / "b", tmp_path / "none" / "b.npz"):
        fails("must name a new .npz file in a folder that can be written to, got '.*'", low, "--save-stats", path)
    fails("--device must be cpu, cuda or cuda:N, .* got 'tpu'", low, low, "--device", "tpu")


@pytest.mark.parametrize("module", ["PIL", "tqdm"])
def test_missing_package(world, extractors, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert_fails(capsys, [world / "low", world / "high", *DIGITS], r"needs the package .* `pip install 'genperf\[fid\]'`")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([f"--size={size}"], f"--size: must be N or WxH in pixels, got '{size}'")
        for size in ("0", "8x", "x8", "8x0", "-8", "8.5", "8x8x8", "")
    ]
    + [
        (["--batch-size", "0"], "--batch-size: must be a whole number of at least 1"),
        (["--workers", "0"], "--workers: must be"),
        (["--channels", "2"], "--channels: invalid choice"),
        (["--pixels", "float"], "--pixels: invalid choice"),
        (["--kid-subset-size", "1"], "--kid-subset-size: must be a whole number of at least 2"),
        (["--neighbors", "0"], "--neighbors: must be"),
    ],
)
def test_option_errors_state_the_rule(options, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        fid("A", "B", *options)
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err
