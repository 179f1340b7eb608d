# SPDX-License-Identifier: Apache-2.0
"""What `genperf fid` reads: images in folders, archives and arrays, features, statistics files."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from digits_world import DIGITS, PER_CLASS, assert_fails, direct_terms, features_of, fid_json, files, statistics_of
from PIL import EpsImagePlugin, Image

from genperf._errors import UserError
from genperf.fid.images import read_batches
from genperf.fid.sources import open_source
from genperf.training.data import load_images


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
    fails(r"one size unless --size gives it, got 8x8 in '.*0\.png' and 9x8 in '.*1\.png'; --size 299 resizes")
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
