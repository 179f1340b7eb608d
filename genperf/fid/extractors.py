"""Feature extractors of `genperf fid`: torch-fidelity's Inception, or any callable that the user names."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .._errors import UserError
from ..metrics._features import feature_rows, only_output

# From bytes to what an extractor takes.
PIXELS = {
    "unit": lambda images: images.float() / 255,
    "signed": lambda images: images.float() / 127.5 - 1,
    "uint8": lambda images: images,
}


class Extractor:
    """Maps images, uint8 [B, C, H, W], to features [B, d].

    The callable gets the images on the device in the form that `pixels` names. It returns features [B, d], or feature
    maps [B, d, H, W], of which the mean over all positions is taken; or a tuple or list of just one such tensor.

    It runs without TF32, so that a GPU's features are those of a CPU up to rounding of float32.
    """

    def __init__(self, name: str, function: Callable[[Tensor], object], *, pixels: str, device: torch.device) -> None:
        if isinstance(function, nn.Module):
            function = function.to(device).eval()
        self.name = name
        self.pixels = pixels
        self.device = device
        self._function = function

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        shape = list(images.shape)
        images = PIXELS[self.pixels](images.to(self.device))
        try:
            with _full_float32():
                features = self._function(images)
        except Exception as error:
            raise UserError(f"the extractor {self.name!r} failed on images {shape}: {_reason(error)}.") from error
        owner = f"the extractor {self.name!r}"
        try:
            features = only_output(owner, features)
            rows = feature_rows(owner, features, None)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        if len(rows) != shape[0]:
            raise UserError(f"{owner} must return features of every image, got {list(features.shape)} for images {shape}.")
        return rows


@contextmanager
def _full_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 without TF32; afterwards as before."""
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # chosen for single operators with torch.backends' fp32_precision, which these cannot tell: the user's own choice
        yield
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def load_extractor(name: str, *, pixels: str | None, weights: Path | None, device: torch.device) -> Extractor:
    """The extractor of --extractor: "inception", or "module.path:callable".

    Raises:
        UserError: a sentence that says why there is none.
    """
    if name == "inception":
        if pixels not in (None, "uint8"):
            raise UserError(f"--pixels must be uint8 for --extractor inception, got {pixels}.")
        return Extractor(name, _inception(weights), pixels="uint8", device=device)
    if weights is not None:
        raise UserError(f"--weights are those of --extractor inception, got --extractor {name}.")
    return Extractor(name, _named(name), pixels=pixels or "unit", device=device)


def _inception(weights: Path | None) -> nn.Module:
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except Exception as error:  # a torchvision that does not fit raises other kinds than ImportError
        raise UserError(
            f"--extractor inception needs the package torch-fidelity ({_reason(error)}); install it with `pip install 'genperf[fid]'`, "
            f"or name another extractor."
        ) from error
    if weights is None:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(module.URL_INCEPTION_V3).name)
        if not cached.is_file():
            print(f"genperf: torch-fidelity downloads its Inception weights from {module.URL_INCEPTION_V3} to {cached}.", file=sys.stderr)
    elif not weights.is_file():
        raise UserError(f"--weights must be a file, got {str(weights)!r}, which is none.")
    try:
        path = None if weights is None else str(weights)
        return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except Exception as error:
        origin = module.URL_INCEPTION_V3 if weights is None else repr(str(weights))
        raise UserError(f"the Inception weights from {origin} cannot be loaded: {_reason(error)}.") from error


def _named(name: str) -> Callable[[Tensor], object]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"--extractor must be inception or module.path:callable, got {name!r}.")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m` does, where the installed script does not
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UserError(f"--extractor {name!r} cannot be imported: {_reason(error)}.") from error
    if not isinstance(found, nn.Module) and _needs_no_argument(found):
        try:
            found = found()
        except Exception as error:
            raise UserError(f"--extractor {name!r} cannot be called without arguments: {_reason(error)}.") from error
    if not callable(found) or inspect.isclass(found):  # a class that needs arguments
        raise UserError(f"--extractor {name!r} must lead to a callable that maps images to features, got {found!r}.")
    return found


def _needs_no_argument(function: object) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return False
    return True


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
