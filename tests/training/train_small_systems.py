# SPDX-License-Identifier: Apache-2.0
"""Train every system on a few random images in float64, in one process or under torchrun, and save losses and states.

python train_small_systems.py FILE
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from genperf.models import SYSTEMS
from genperf.training.data import LabeledImages
from genperf.training.runs import Settings, build_system
from genperf.training.trainer import Training

SMALL = {
    "width": 8,
    "hidden": 8,
    "dim": 4,
    "latent_dim": 4,
    "num_codes": 5,
    "prior_width": 8,
    "prior_shift": 1,
    "prior_dropout": 0.1,
    "class_conditional": True,
    "replace_dead_below": 0.1,
    "normal_class": 1,
    "labels_per_class": 2,
    "critic_steps": 2,
    "instance_noise": 0.1,
    "feature_matching": 0.1,
}
EPOCHS = 2
BATCH = 8


def images() -> LabeledImages:
    generator = torch.Generator().manual_seed(0)
    return LabeledImages(torch.rand(24, 1, 16, 16, generator=generator), torch.arange(24) % 3)


def train(name: str, fabric: Fabric) -> dict:
    data = images()
    config = {field.name: SMALL[field.name] for field in dataclasses.fields(SYSTEMS[name].Config) if field.name in SMALL}
    settings = Settings(epochs=EPOCHS, batch_size=BATCH, seed=3)
    system = build_system(name, settings, config, data).double()
    data = LabeledImages(*system.prepare(*data))
    training = Training(fabric, system, data, settings)
    with fabric.strategy.precision.forward_context():
        system.initialize(data.images[training.batches()[0]].double())
    training.run(EPOCHS, lambda: None)
    return {"history": training.history, "model": system.state_dict()}


def main() -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if world > 1 else "auto"
    # float64, as Adam amplifies rounding errors of small gradients.
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy, precision="64-true")
    fabric.launch()
    torch.set_num_threads(1)
    results = {name: train(name, fabric) for name in SYSTEMS}
    if fabric.is_global_zero:
        torch.save(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
