# SPDX-License-Identifier: Apache-2.0
"""Feature extractors of `genperf fid`: torch-fidelity's Inception, models of transformers, or a callable given by name."""

import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from .._choices import Pixels
from .._errors import UserError, reason
from .._messages import log
from ..metrics._features import finite_features, only_output
from .pretrained_extractors import PRETRAINED, load_pretrained

# Conversions from uint8 to the extractor's input.
PIXELS: dict[Pixels, Callable[[Tensor], Tensor]] = {
    "unit": lambda images: images.float() / 255,
    "signed": lambda images: images.float() / 127.5 - 1,
    "uint8": lambda images: images,
}


class Extractor:
    """Maps images, uint8 [B, C, H, W], to features [B, d].

    The callable gets the images on the device, converted as `pixels` says. It returns features [B, d], or feature maps [B, d, H, W],
    which are averaged over H and W, or a tuple or list with one such tensor. It runs without gradients and without TF32, so that features
    on a GPU match those on a CPU up to float32 rounding.

    Args:
        name: for error messages.
        pixels: a key of `PIXELS`.
    """

    def __init__(self, name: str, function: Callable[[Tensor], object], *, pixels: Pixels, device: torch.device) -> None:
        if isinstance(function, nn.Module):
            function = function.to(device).eval()
        self.name = name
        self.pixels: Pixels = pixels
        self.device = device
        self._function = function

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        owner = f"the extractor {self.name!r}"
        shape = list(images.shape)
        images = PIXELS[self.pixels](images.to(self.device))
        try:
            with _without_tf32():
                features = self._function(images)
        except Exception as error:
            raise UserError(f"{owner} failed on images {shape}: {reason(error, with_class=True)}.") from error
        try:
            features = only_output(owner, features)
            rows = finite_features(owner, features, None)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        if len(rows) != shape[0]:
            raise UserError(f"{owner} must return features of every image, got {list(features.shape)} for images {shape}.")
        return rows


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 in convolutions and matrix products within the context."""
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the user has set fp32_precision per operator, which these settings cannot express: leave it
        yield
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def load_extractor(name: str, *, pixels: Pixels | None, weights: Path | None, device: torch.device) -> Extractor:
    """Load the extractor "inception", one of `PRETRAINED`, or "module.path:callable".

    Args:
        pixels: a key of `PIXELS`; None for "uint8" with Inception and "unit" otherwise.
        weights: file of Inception's weights, or None for those in the cache of torch.hub, downloaded if necessary; for one of
            `PRETRAINED` the folder of the model.

    Raises:
        UserError: the extractor cannot be loaded, or an option does not apply to it.
    """
    if name == "inception":
        if pixels not in (None, "uint8"):
            raise UserError(f"--pixels must be uint8 for --extractor inception, got {pixels}.")
        inception = _inception(weights)
        if device.type == "cpu":  # oneDNN's convolutions take 0.6 of the time there
            convert_conv2d_weight_memory_format(inception, torch.channels_last)
        return Extractor(name, inception, pixels="uint8", device=device)
    if name in PRETRAINED:
        if pixels not in (None, "unit"):
            raise UserError(f"--pixels must be unit for --extractor {name}, got {pixels}.")
        return Extractor(name, load_pretrained(name, weights), pixels="unit", device=device)
    if weights is not None:
        raise UserError(f"--weights are those of --extractor inception, {' or '.join(PRETRAINED)}, got --extractor {name}.")
    return Extractor(name, _import_callable(name), pixels=pixels or "unit", device=device)


def _inception(weights: Path | None) -> nn.Module:
    try:
        module = _import_inception()
    except Exception as error:
        raise UserError(
            f"--extractor inception needs the package torch-fidelity ({reason(error, with_class=True)}); install it with "
            f"`pip install --no-deps torch-fidelity`, or name another extractor."
        ) from error
    if weights is None:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(module.URL_INCEPTION_V3).name)
        if not cached.is_file():
            log.warning("torch-fidelity downloads its Inception weights from %s to %s.", module.URL_INCEPTION_V3, cached)
    elif not weights.is_file():
        raise UserError(f"--weights must be a file, got {str(weights)!r}, which is not one.")
    try:
        path = None if weights is None else str(weights)
        return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except Exception as error:
        origin = module.URL_INCEPTION_V3 if weights is None else repr(str(weights))
        raise UserError(f"the Inception weights from {origin} cannot be loaded: {reason(error, with_class=True)}.") from error


def _import_inception() -> Any:
    """torch-fidelity's module of Inception, which needs torch alone. The package itself imports torchvision, which depends on one torch."""
    name = "torch_fidelity"
    inception = f"{name}.feature_extractor_inceptionv3"
    if name in sys.modules:
        return importlib.import_module(inception)
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[name] = package
    try:
        return importlib.import_module(inception)
    finally:
        del sys.modules[name]  # another import of the package runs its own code


def _import_callable(name: str) -> Callable[[Tensor], object]:
    """Import "module.path:callable". A callable without required arguments is a factory and is called."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"--extractor must be inception, {', '.join(PRETRAINED)} or module.path:callable, got {name!r}.")
    if os.getcwd() not in sys.path and "" not in sys.path:  # `python -m` adds it, the installed script does not
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:
        raise UserError(f"--extractor {name!r} cannot be imported: {reason(error, with_class=True)}.") from error
    if not isinstance(function, nn.Module) and _takes_no_arguments(function):
        try:
            function = function()
        except Exception as error:
            raise UserError(f"--extractor {name!r} cannot be called without arguments: {reason(error, with_class=True)}.") from error
    if not callable(function) or inspect.isclass(function):  # a class with required arguments
        raise UserError(f"--extractor {name!r} must be a callable that maps images to features, got {function!r}.")
    return function


def _takes_no_arguments(function: object) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return False
    return True
