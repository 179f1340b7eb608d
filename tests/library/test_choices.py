# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments that choose among texts: type checkers and the checks of arguments know the same ones."""

import importlib
import inspect
import re
import typing

import pytest
import torch

import genperf
from genperf import _choices
from genperf.losses.gradient_penalty import CENTERS
from genperf.models.latent import INTERPOLATIONS

CHOOSING = {"metric", "impl", "kind", "logits", "gradient", "precision", "layout", "init", "update", "loss", "penalty"}
PUBLIC = ("genperf", *(f"genperf.{name}" for name in ("nn", "losses", "metrics", "models")))


def public_parameters():
    """Each keyword of CHOOSING of a public function, method or layer, with its annotation."""
    for package in map(importlib.import_module, PUBLIC):
        for name in package.__all__:
            found = getattr(package, name)
            members = [found] if not inspect.isclass(found) else [found.__init__, *(m for _, m in inspect.getmembers(found, callable))]
            for member in members:
                if not inspect.isfunction(member) or not member.__module__.startswith("genperf"):
                    continue
                for parameter in inspect.signature(member).parameters.values():
                    if parameter.name in CHOOSING and parameter.annotation is not inspect.Parameter.empty:
                        yield f"{package.__name__}.{name}", parameter


def test_public_keywords_that_choose_have_literal_types():
    found = list(public_parameters())
    assert {parameter.name for _, parameter in found} >= CHOOSING - {"logits", "loss", "penalty"}
    for owner, parameter in found:
        texts = [parameter.annotation, *typing.get_args(parameter.annotation)]
        assert str not in texts, f"{owner}: {parameter}"
        if isinstance(parameter.default, str):
            assert parameter.default in typing.get_args(parameter.annotation) or any(
                parameter.default in typing.get_args(member) for member in typing.get_args(parameter.annotation)
            ), f"{owner}: {parameter}"


@pytest.mark.parametrize(("choices", "known"), [(_choices.Penalty, CENTERS), (_choices.Interpolation, INTERPOLATIONS)])
def test_tables_have_a_row_for_every_choice(choices, known):
    assert typing.get_args(choices) == tuple(known)


def test_a_text_of_another_choice_is_an_error():
    x = torch.zeros(2, 3)
    for call, choices in (
        (lambda: genperf.nearest_code(x, x, metric="dot"), _choices.Metric),
        (lambda: genperf.nearest_code(x, x, impl="cosine"), _choices.Impl),
        (lambda: genperf.vector_quantize(x, x, gradient="none"), _choices.Gradient),
        (lambda: genperf.code_entropy(x, x, logits="cosine"), _choices.Logits),
        (lambda: genperf.kmeans(x, 1, init="kmeans"), _choices.ClusterInit),
        (lambda: genperf.kmeans(x, 1, update="step"), _choices.ClusterUpdate),
        (lambda: genperf.nn.VectorQuantizer(2, 3, init="random"), _choices.CodebookInit),
        (lambda: genperf.nn.VectorQuantizer(2, 3, update="ema"), _choices.UpdateTime),
        (lambda: genperf.losses.generator_loss(x, "wgan-gp"), _choices.AdversarialLoss),
    ):
        with pytest.raises(ValueError, match=", ".join(map(re.escape, typing.get_args(choices)))):
            call()
