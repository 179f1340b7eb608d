"""The VQ-VAE of `genperf train vqvae` on MNIST digits, with the quantizer of vector-quantize-pytorch and with genperf's drop-in for it.

The two runs differ by the import alone: seed, arguments, batches and everything else are the same. Prints both loss curves, means over
the last tenth of the run at each point, and the wall time of both.
"""

import argparse
import importlib
import statistics
import time

import torch

from genperf.models import VQVAE, VQVAEConfig
from genperf.models.vqvae import quantized_losses
from genperf.training.data import load_images, split_held_out

PACKAGES = ("vector_quantize_pytorch", "genperf.compat.vector_quantize_pytorch")
POINTS = 10


def train(package: str, arguments: argparse.Namespace) -> tuple[list[float], float, float]:
    """The loss of each step, the squared error on digits held out, and the seconds of the training."""
    VectorQuantize = importlib.import_module(package).VectorQuantize
    training, held_out = (part.images for part in split_held_out(load_images(None)))
    torch.manual_seed(arguments.seed)
    config = VQVAEConfig(num_codes=arguments.codes, prior_width=0)
    model = VQVAE(config)
    model.quantizer = VectorQuantize(
        config.dim, config.num_codes, decay=config.decay, commitment_weight=config.commitment_weight, accept_image_fmap=True
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    batches = torch.Generator().manual_seed(arguments.seed)
    losses = []
    start = time.perf_counter()
    for _ in range(arguments.steps):
        images = training[torch.randint(len(training), (arguments.batch_size,), generator=batches)]
        loss = quantized_losses(model(images), images)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = (model.eval()(held_out).reconstruction - held_out).square().mean().item()
    return losses, error, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < POINTS:
        parser.error(f"--steps must be at least {POINTS}, got {arguments.steps}.")
    curves, errors, times = zip(*(train(package, arguments) for package in PACKAGES), strict=True)
    print(f"{'step':>8}  " + "  ".join(f"{package:>38}" for package in PACKAGES))
    tenth = arguments.steps // POINTS
    for end in range(tenth, arguments.steps + 1, tenth):
        print(f"{end:8}  " + "  ".join(f"{statistics.mean(losses[end - tenth : end]):38.5f}" for losses in curves))
    print("held out  " + "  ".join(f"{error:38.5f}" for error in errors))
    print(f"{'seconds':>8}  " + "  ".join(f"{seconds:38.2f}" for seconds in times))


if __name__ == "__main__":
    main()
