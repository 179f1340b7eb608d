# SPDX-License-Identifier: Apache-2.0
"""What holds for all systems."""

import dataclasses

import pytest

from genperf.models import SYSTEMS

# Of the networks' sizes and of the classes, where a system has them.
SMALL = {"width": 4, "hidden": 4, "latent_dim": 4, "num_codes": 4, "prior_width": 4, "num_classes": 2, "class_conditional": True}


def build(name, side, **options):
    config_class = SYSTEMS[name].Config
    fields = {field.name for field in dataclasses.fields(config_class)}
    small = {field: value for field, value in SMALL.items() if field in fields}
    return SYSTEMS[name](config_class(image_shape=(1, side, side), **{**small, **options}))


@pytest.mark.parametrize("name", SYSTEMS)
def test_least_side_and_downsampling_are_what_the_networks_take(name):
    system = build(name, 28)
    least, multiple = system.least_side(system.config), system.downsampling
    for side in (least, least + multiple):
        build(name, side)
    for side in {least - multiple, *range(least + 1, least + multiple)} - {0}:
        with pytest.raises(ValueError, match="sides"):
            build(name, side)


def test_least_side_of_a_pyramid_depends_on_its_levels():
    lapgan = SYSTEMS["lapgan"]
    assert [lapgan.least_side(lapgan.Config(levels=levels)) for levels in (1, 2, 4)] == [4, 8, 32]
    build("lapgan", 32, levels=4)
    with pytest.raises(ValueError, match="sides of at least 32 for 4 levels"):
        build("lapgan", 31, levels=4)
