# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments that choose among texts: type checkers and the checks of arguments know the same ones."""

import argparse
import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing

import pytest
import torch

import genperf
from genperf import _choices, compat
from genperf.cli.options import add_field
from genperf.fid.extractors import PIXELS
from genperf.losses.gradient_penalty import CENTERS
from genperf.models._adversarial_networks import NORMS
from genperf.models.latent import INTERPOLATIONS
from genperf.models.system import choices_of, option
from genperf.nn.laplacian_pyramid import KERNELS

PUBLIC = ("genperf",)
PUBLIC += tuple(f"genperf.{name}" for name in ["nn", "losses", "metrics", "models", "clustering", "testing", "fid.scores", "training.runs"])
PUBLIC += tuple(f"genperf.compat.{module.name}" for module in pkgutil.iter_modules(compat.__path__) if module.name[0] != "_")
# Parameters that take any text: names, paths and devices.
ANY_TEXT = {"data", "device", "extractor", "meaning", "name", "only", "option", "path", "player", "purpose", "reference", "remap"}
ANY_TEXT |= {"a", "b", "mu1", "mu2", "sigma1", "sigma2"}  # of compare, and of pytorch-fid, whose arrays may be of any kind


def public_parameters():
    """Each parameter of a public function, method, layer or configuration, with its annotation."""
    for module in map(importlib.import_module, PUBLIC):
        own = [name for name, found in vars(module).items() if name[0] != "_" and getattr(found, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            found = getattr(module, name)
            if not callable(found) or not (getattr(found, "__module__", None) or "").startswith("genperf."):
                continue
            members = [found] if not inspect.isclass(found) else [found.__init__, *(m for n, m in inspect.getmembers(found) if n[0] != "_")]
            for member in members:
                if inspect.isfunction(member) and member.__module__.startswith("genperf."):
                    for parameter in inspect.signature(member).parameters.values():
                        yield f"{module.__name__}.{name}.{member.__name__}", parameter


def test_public_parameters_that_choose_have_literal_types():
    found = list(public_parameters())
    choosing = (
        "metric impl kind gradient precision layout init update norm noise likelihood kernel loss penalty pixels unknown_index act_name"
    )
    assert set(choosing.split()) <= {parameter.name for _, parameter in found}
    for owner, parameter in found:
        is_union = typing.get_origin(parameter.annotation) in (typing.Union, types.UnionType)
        members = typing.get_args(parameter.annotation) if is_union else [parameter.annotation]
        assert str not in members or parameter.name in ANY_TEXT, f"{owner}: {parameter} has any text, though it may choose among some"
        texts = [text for member in members if typing.get_origin(member) is typing.Literal for text in typing.get_args(member)]
        if texts and isinstance(parameter.default, str):
            assert parameter.default in texts, f"{owner}: {parameter}"


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (_choices.Penalty, CENTERS),
        (_choices.Interpolation, INTERPOLATIONS),
        (_choices.Normalization, NORMS),
        (_choices.PyramidKernel, KERNELS),
        (_choices.Pixels, PIXELS),
    ],
)
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
        (lambda: genperf.nn.LaplacianPyramid(2, "triangle"), _choices.PyramidKernel),
        (lambda: genperf.testing.vectors("sorted", 2, 2, 2, torch.float32, "cpu"), genperf.testing.Vectors),
    ):
        with pytest.raises(ValueError, match=", ".join(map(re.escape, typing.get_args(choices)))):
            call()


@pytest.mark.parametrize("system", genperf.models.SYSTEMS.values())
def test_systems_and_their_command_line_have_the_choices_of_their_fields(system):
    for field in dataclasses.fields(system.Config):
        choices = choices_of(field)
        if choices is None:
            assert field.type is not str, field.name
            continue
        assert field.default in choices
        config = dataclasses.replace(system.Config(), **{field.name: "other"})
        listed = ", ".join(map(str, choices))
        with pytest.raises(ValueError, match=re.escape(f"{field.name} must be one of {listed}, got 'other'.")):
            system(config)
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_field(parser.add_argument_group(), "--chosen", field)
        assert vars(parser.parse_args(["--chosen", choices[-1]])) == {"chosen": choices[-1]}
        with pytest.raises(argparse.ArgumentError, match=re.escape(f"must be one of {listed.replace('None', 'none')}, got 'other'")):
            parser.parse_args(["--chosen", "other"])


def test_choices_of_an_option_are_those_given_or_of_its_type():
    @dataclasses.dataclass
    class Config:
        given: str = option("a", "", choices=("a", "b"))
        typed: typing.Literal["a", "b"] = option("b", "")
        optional: typing.Literal["a"] | None = option(None, "")
        number: float | None = option(0.5, "")
        size: int = 3

    found = [choices_of(field) for field in dataclasses.fields(Config)]
    assert found == [("a", "b"), ["a", "b"], [None, "a"], None, None]
