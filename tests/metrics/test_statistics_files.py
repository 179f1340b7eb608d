# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import re

import numpy as np
import pytest
import torch

from genperf.metrics import FeatureMoments, FrechetReference, load_features, load_moments, load_statistics, save_statistics
from genperf.metrics.statistics_files import write_atomically


def moments(dim=5, unbiased=True, seed=0, count=40):
    x = np.random.default_rng(seed).normal(3, 1, (count, dim))
    return x.mean(0), np.cov(x, rowvar=False, ddof=int(unbiased)), x


class Program:
    """Its pickle runs a command when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["pytorch-fid", "edm", "adm", "fd-loss"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_layouts_are_written_and_read(layout, kind, tmp_path):
    mean, cov, _ = moments()
    second = moments(3, seed=1)[:2] if layout in ("adm", "fd-loss") else None
    path = tmp_path / "stats.npz"
    path.write_bytes(b"what was there before")
    wrap = np.asarray if kind == "numpy" else torch.from_numpy
    save_statistics(path, wrap(mean), wrap(cov), layout=layout, second=second)
    names = {"adm": ("mu_s", "sigma_s"), "fd-loss": ("avg_mu", "avg_sigma")}.get(layout)
    with np.load(path) as arrays:
        assert set(arrays.files) == {"mu", "sigma", *(names or ())}
        assert arrays["sigma"].dtype == np.float64
    for found in (load_statistics(path), load_moments(str(path))):
        assert all(t.dtype == torch.float64 for t in found)
        np.testing.assert_array_equal(found[0], mean)
        np.testing.assert_allclose(found[1], cov, rtol=1e-15, atol=1e-16)
    if names:
        np.testing.assert_array_equal(load_statistics(path, keys=names)[0], second[0])
    assert os.listdir(tmp_path) == ["stats.npz"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_stylegan_pickles(protocol, tmp_path):
    x = moments()[2].astype(np.float32)
    content = {
        "capture_all": False,
        "capture_mean_cov": True,
        "max_items": 40,
        "num_items": 40,
        "num_features": 5,
        "all_features": [],
        "raw_mean": x.astype(np.float64).sum(0),
        "raw_cov": x.astype(np.float64).T @ x.astype(np.float64),
    }
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    biased = FeatureMoments(unbiased=False).update(torch.from_numpy(x))
    mean, cov = load_statistics(path)
    torch.testing.assert_close(mean, biased.mean)
    torch.testing.assert_close(cov, biased.cov, rtol=1e-10, atol=1e-12)
    assert isinstance(load_moments(path), tuple)

    save_statistics(path, mean, cov, layout="stylegan", count=40)
    written = pickle.loads(path.read_bytes())
    assert set(written) == set(content)
    assert written["num_items"] == 40
    np.testing.assert_allclose(written["raw_mean"], content["raw_mean"])
    np.testing.assert_allclose(written["raw_cov"], content["raw_cov"])
    torch.testing.assert_close(load_statistics(path)[1], cov)

    content |= {"capture_all": True, "capture_mean_cov": False, "all_features": [x[:30], x[30:]], "raw_cov": np.zeros((5, 5))}
    path.write_bytes(pickle.dumps(content, protocol))
    for found in (load_moments(path), load_features(path)):
        np.testing.assert_array_equal(found, x)


def test_stylegan_sums_in_an_npz(tmp_path):
    _, cov, x = moments(unbiased=False)
    np.savez(tmp_path / "sums.npz", raw_mean=x.sum(0), raw_cov=x.T @ x, num_items=len(x))
    np.testing.assert_allclose(load_statistics(tmp_path / "sums.npz")[1], cov, rtol=1e-10)


def test_nested_dictionaries(tmp_path):
    mean, cov, _ = moments()
    other = moments(3, seed=1)
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": mean, "sigma": cov}, "fd_dinov2": {"mu": other[0], "sigma": other[1]}}))
    np.testing.assert_array_equal(load_statistics(path)[0], mean)
    np.testing.assert_array_equal(load_moments(path, keys=("fd_dinov2/mu", "fd_dinov2/sigma"))[0], other[0])
    with pytest.raises(ValueError, match=r"must hold 'a' and 'b', got the names fd_dinov2/mu, fd_dinov2/sigma, fid/mu, fid/sigma"):
        load_statistics(path, keys=("a", "b"))
    with pytest.raises(ValueError, match="keys must be the two names"):
        load_statistics(path, keys="mu")


def test_pickles_execute_no_code(tmp_path):
    mean, cov, _ = moments()
    for name, content in {
        "plain.pkl": {"mu": mean, "sigma": cov, "more": Program(tmp_path / "executed")},
        "array.pkl": {"mu": mean, "sigma": np.array([Program(tmp_path / "executed")], dtype=object)},
    }.items():
        (tmp_path / name).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"the pickle (names \w+.mkdir|holds an array of object)"):
            load_statistics(tmp_path / name)
    np.savez(tmp_path / "object.npz", mu=mean, sigma=np.array([Program(tmp_path / "executed")], dtype=object))
    np.save(tmp_path / "object.npy", {"mu": mean, "sigma": cov, "more": Program(tmp_path / "executed")})
    for name in ("object.npz", "object.npy"):
        with pytest.raises(ValueError, match=f"{name} must be .* cannot be read"):
            load_statistics(tmp_path / name)
    assert not (tmp_path / "executed").exists()


class Call:
    """Its pickle calls a function when loaded, and then sets a state."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return self.function, self.arguments, self.state


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_create_no_object_pointers(protocol, tmp_path):
    """numpy's own functions would interpret the eight bytes as an object pointer, or read out of bounds."""
    path, pointer = tmp_path / "stats.pkl", b"AAAAAAAA"
    reconstruct, scalar = (x.__reduce__()[0] for x in (np.zeros(1), np.float64(1)))

    def array(shape, dtype):
        return Call(reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, pointer))

    for content in (
        np.array([None]),
        np.zeros(1, "f8,f8"),
        array((4096,), np.dtype("f8")),
        array((-1, -1), np.dtype("f8")),
        Call(scalar, np.dtype("O"), pointer),
        Call(np.ndarray, (1,), "O", pointer),
        Call(np.ndarray, (1,), np.dtype("O"), pointer),
    ):
        path.write_bytes(pickle.dumps({"mu": content, "sigma": np.eye(1)}, protocol))
        with pytest.raises(ValueError, match=r"load_statistics: .* cannot be read"):
            load_statistics(path)
    flagged = Call(np.dtype, "f8", False, True, state=(3, "<", None, None, None, -1, -1, 63))  # flags of an array of objects
    path.write_bytes(pickle.dumps({"mu": array((1,), flagged), "sigma": np.eye(1)}, protocol))
    assert load_statistics(path)[0].item() == np.frombuffer(pointer)[0]


def test_arrays_of_pickles_keep_their_order_and_type(tmp_path):
    mean, cov, x = moments()
    for protocol in (0, 2, 5):
        for array in (x, np.asfortranarray(x), x.astype(">f4"), x[::2], x.astype(np.float16)):
            (tmp_path / "x.pkl").write_bytes(pickle.dumps({"mu": mean, "sigma": cov, "features": array, "n": np.int32(7)}, protocol))
            found = load_features(tmp_path / "x.pkl")
            assert found.dtype.itemsize == array.dtype.itemsize
            np.testing.assert_array_equal(found.numpy(), array)
            found.fill_(1)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", np.longdouble])
def test_features(dtype, tmp_path):
    x = moments()[2].astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez(tmp_path / "named.npz", labels=np.arange(40), features=x)
    np.savez(tmp_path / "feats.npz", feats=x, arr_0=np.arange(40))
    for name in ("x.npy", "one.npz", "named.npz", "feats.npz"):
        for load in (load_features, load_moments):
            found = load(tmp_path / name)
            assert found.dtype.itemsize == min(8, x.dtype.itemsize)
            np.testing.assert_array_equal(found.numpy(), x.astype(np.float64))
    found[0] = 7
    load_features(tmp_path / "x.npy")[0] = 7
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), x, "writing to the tensor must not change the file")


def test_statistics_take_precedence_over_other_arrays(tmp_path):
    mean, cov, x = moments()
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=cov, arr_0=np.zeros((4, 8, 8, 3), np.uint8), features=x)
    assert isinstance(load_moments(tmp_path / "adm.npz"), tuple)
    assert load_features(tmp_path / "adm.npz").shape == x.shape


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_low_precision_covariances_are_symmetrized(dtype, tmp_path):
    mean, cov, _ = moments()
    cov = cov.astype(dtype)
    cov[0, 1] = np.nextafter(cov[1, 0], np.asarray(9, dtype))
    np.savez(tmp_path / "half.npz", mu=mean.astype(dtype), sigma=cov)
    found = load_statistics(tmp_path / "half.npz")[1]
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "must hold floats|must hold features, floats"),
        ({"mu": np.zeros(3), "cov": np.eye(3)}, "must hold 'mu' and 'sigma', got the names cov, mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"shapes \[d\] and \[d, d\], got \[3\] and \[4, 4\]"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"got \[1, 3\] and \[3, 3\]"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"got \[0\] and \[0, 0\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu must be finite, got 3 NaN or infinite of 3"),
        ({"mu": np.zeros(2), "sigma": np.diag([1, np.inf])}, "sigma must be finite, got 1 NaN or infinite of 4"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, "sigma must be symmetric, got entries that differ by 0.5"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -0.2])}, "variances on its diagonal, got -0.2"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "mu must hold real numbers, got <U1"),
        ({"raw_mean": np.zeros(2), "raw_cov": np.eye(2), "num_items": np.array(0)}, "at least one sample, got num_items=0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"floats \[N, d\], got uint8 \[2, 4, 4, 3\] as 'arr_0'"),
        ({}, "must hold 'mu' and 'sigma', got nothing"),
    ],
)
def test_error_names_the_file(arrays, message, tmp_path):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=rf"load_moments: .*stats.npz.* ({message})"):
        load_moments(tmp_path / "stats.npz")


def test_unreadable_files(tmp_path):
    (tmp_path / "text.pkl").write_text("x")
    with pytest.raises(ValueError, match=r"text.pkl must be .*, got one that cannot be read: KeyError: 120\.$"):
        load_statistics(tmp_path / "text.pkl")
    np.savez(tmp_path / "whole.npz", mu=np.zeros(300), sigma=np.eye(300))
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content in {
        "empty.npz": b"",
        "text.npz": b"mu = 3",
        "cut.npz": whole[: len(whole) // 2],
        "list.pkl": pickle.dumps([1]),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"load_statistics: .*{name} must be an .npz, .npy, .pkl or .pt file of arrays"):
            load_statistics(tmp_path / name)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged.npz must be .* cannot be read"):
        load_statistics(tmp_path / "damaged.npz")
    with pytest.raises(FileNotFoundError, match=r"load_features: there is no file .*none.npy"):
        load_features(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"must be an .npz, .npy, .pkl or .pt file"):
        load_statistics(tmp_path)
    mean, cov, _ = moments()
    save_statistics(tmp_path / "stats.npz", mean, cov)
    with pytest.raises(ValueError, match=r"stats.npz must hold features \[N, d\], got the names mu, sigma"):
        load_features(tmp_path / "stats.npz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.npz", {"layout": "tensorflow"}, "layout must be one of pytorch-fid, edm, adm, fd-loss, stylegan, got 'tensorflow'"),
        ("a", {}, r"must end in .npz, got '.*a'"),
        ("a.npz", {"layout": "stylegan", "count": 3}, r"must end in .pkl"),
        ("a.pkl", {"layout": "stylegan"}, "needs the positive number of samples as count, got None"),
        ("a.npz", {"count": 3}, "has no count, got 3"),
        ("a.npz", {"layout": "adm"}, r"needs second=\(mean, cov\), written as mu_s and sigma_s, got None"),
        ("a.npz", {"second": (np.zeros(2), np.eye(2))}, "has no second pair, got one"),
        ("a.npz", {"layout": "adm", "second": (np.zeros(2), np.eye(3))}, r"second\[0\] and second\[1\] must have shapes"),
        ("a.npz", {"cov": np.eye(4)}, r"mean and cov must have shapes \[d\] and \[d, d\], got \[5\] and \[4, 4\]"),
    ],
)
def test_failed_save_leaves_no_file(name, options, message, tmp_path):
    mean, cov, _ = moments()
    with pytest.raises(ValueError, match=f"save_statistics: .*{message}"):
        save_statistics(tmp_path / name, **({"mean": mean, "cov": cov} | options))
    assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "stats.npz"
    path.write_bytes(b"before")

    def write(file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, write)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["stats.npz"]


def test_files_of_other_evaluators(tmp_path):
    mean, cov, x = moments()
    np.savez(tmp_path / "dgm-eval.npz", model=np.array(None, dtype=object), reps=x, hparams=np.array({"a": 1}, dtype=object))
    for load in (load_features, load_moments):
        np.testing.assert_array_equal(load(tmp_path / "dgm-eval.npz"), x)
    torch.save({"mu": mean, "sigma": cov}, tmp_path / "arrays.pt")
    torch.save({"mu": torch.from_numpy(mean), "sigma": torch.from_numpy(cov).T}, tmp_path / "tensors.pt")
    np.save(tmp_path / "dictionary.npy", {"mu": mean, "sigma": cov})
    for name in ("arrays.pt", "tensors.pt", "dictionary.npy"):
        for load in (load_statistics, load_moments):
            found = load(tmp_path / name)
            np.testing.assert_array_equal(found[0], mean)
            np.testing.assert_allclose(found[1], cov, rtol=1e-15, atol=1e-16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        features = torch.from_numpy(x).to(dtype)
        torch.save({"2048": features[::2]}, tmp_path / "features.pt")
        torch.testing.assert_close(load_features(tmp_path / "features.pt").to(dtype), features[::2], rtol=0, atol=0)
    torch.save(features, tmp_path / "features.pt")
    assert torch.equal(load_features(tmp_path / "features.pt"), features)
    torch.save({"mu": mean}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pt must be .*: it is of a torch before 1.6; load it and save it again\.$"):
        load_statistics(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"mu": np.zeros(2), "sigma": torch.nn.Linear(2, 2)},
        {"mu": np.zeros(2), "sigma": np.array([None], dtype=object)},
    ],
)
def test_objects_in_torch_files_are_rejected(content, tmp_path):
    torch.save(content, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=r"stats.pt must be .* cannot be read: the pickle (names|holds)"):
        load_statistics(tmp_path / "stats.pt")


def test_objects_in_npy_files_are_rejected(tmp_path):
    for content in (np.array([{"mu": 1}], dtype=object), np.array(Program(tmp_path / "executed"), dtype=object), np.array(3, dtype=object)):
        np.save(tmp_path / "object.npy", content)
        with pytest.raises(ValueError, match=r"object.npy must be .* cannot be read"):
            load_statistics(tmp_path / "object.npy")
    assert not (tmp_path / "executed").exists()


def test_negative_strides(tmp_path):
    mean, cov, _ = moments()
    save_statistics(tmp_path / "stats.npz", mean[::-1], cov[::-1, ::-1])
    found = load_statistics(tmp_path / "stats.npz")
    np.testing.assert_array_equal(found[0], mean[::-1])
    np.testing.assert_allclose(found[1], cov[::-1, ::-1], rtol=1e-15)


def test_error_lists_few_of_many_names(tmp_path):
    np.savez(tmp_path / "many.npz", **{f"name{number}": np.zeros(1) for number in range(1000)})
    with pytest.raises(ValueError, match=r"got the names name0, .* and 990 more\.$") as error:
        load_statistics(tmp_path / "many.npz")
    assert len(str(error.value)) < 500


def damage(content, rng):
    """The content cut short, or with some bytes changed, overwritten, removed or repeated."""
    content = bytearray(content)
    kind, start, length = rng.integers(5), rng.integers(len(content)), rng.integers(1, 16)
    if kind == 0:
        return bytes(content[:start])
    if kind == 1:  # in the header
        content[start % 400 % len(content)] = rng.integers(256)
    elif kind == 2:
        content[start] = rng.integers(256)
    else:
        content[start : start + length] = [rng.bytes(length), b"", b"\xff" * 8, content[:length]][rng.integers(4)]
    return bytes(content)


@pytest.mark.parametrize(
    "name", ["stats.npz", "compressed.npz", "features.npy", "dictionary.npy", "0.pkl", "2.pkl", "5.pkl", "arrays.pt", "tensors.pt"]
)
def test_damaged_files_give_a_value_or_one_sentence(name, tmp_path):
    mean, cov, x = moments()
    path = tmp_path / name
    sums = {"num_items": 40, "raw_mean": x.sum(0), "raw_cov": x.T @ x, "all_features": [x[:20], x[20:]]}
    if name.endswith(".npz"):
        (np.savez if name == "stats.npz" else np.savez_compressed)(path, mu=mean, sigma=cov)
    elif name.endswith(".npy"):
        np.save(path, x if name == "features.npy" else {"mu": mean, "sigma": cov})
    elif name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(sums, int(name[0])))
    else:
        torch.save({"mu": mean, "sigma": cov} if name == "arrays.pt" else {"mu": torch.from_numpy(mean), "sigma": torch.eye(5)}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    sentences = set()
    for _ in range(60):
        path.write_bytes(damage(whole, rng))
        for load in (load_moments, load_features, load_statistics, FrechetReference.load):
            try:
                load(path)
            except ValueError as error:
                sentences.add(str(error))
    assert sentences
    for sentence in sentences:
        assert re.fullmatch(r"[\w.]+: [^\n]*\.", sentence), sentence
        assert len(sentence) < 1000
