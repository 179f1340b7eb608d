# SPDX-License-Identifier: Apache-2.0
"""`genperf kmeans`: identifiers of vectors by residual k-means."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import get_args

from .._choices import ClusterInit, ClusterUpdate, Metric
from .._distributed import process_group, rank
from ..ops import KMeansProgress
from . import options
from .streams import print_result

_DESCRIPTION = """\
Cluster vectors by k-means, and again what each stage leaves of them: every vector gets an identifier of one code per stage.

The data are an .npy file of vectors [N, D], which may be larger than memory, an .npz file, or a .parquet file with a column of lists.
Identifiers go to --out (.npy, .npz or .parquet), codebooks, a report and a picture of the cluster sizes to files beside it. A run that is
interrupted continues with --resume after its last complete stage. With torchrun -m genperf kmeans, every process clusters a part of the
vectors; the result is that of one process.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    parser.add_argument("data", metavar="DATA", type=options.path, help="file of vectors: .npy, .npz or .parquet")
    parser.add_argument("--name", metavar="NAME", help="the array or column of DATA (its only one)")
    parser.add_argument("--codes", type=options.number(int, 1), required=True, metavar="K", help="codes of each stage")
    parser.add_argument("--stages", type=options.number(int, 1), default=3, metavar="N", help="codes of an identifier (%(default)s)")
    parser.add_argument("--out", type=options.path, default=Path("ids.npy"), metavar="PATH", help="file of identifiers (%(default)s)")
    parser.add_argument("--iterations", type=options.number(int, 0), default=25, metavar="N", help="iterations of each stage (%(default)s)")
    parser.add_argument(
        "--init",
        type=options.one_of(*get_args(ClusterInit)),
        default="k-means++",
        help="initial codes of a stage: k-means++, or random vectors (%(default)s)",
    )
    parser.add_argument(
        "--n-init", type=options.number(int, 1), default=1, metavar="N", help="runs of each stage, of which the best counts (%(default)s)"
    )
    metric = "euclidean, or cosine: vectors are normalized first, and so are the codes of the first stage (%(default)s)"
    parser.add_argument("--metric", type=options.one_of(*get_args(Metric)), default="euclidean", help=metric)
    weights = ".npy file with a weight for each vector; one of weight 2 counts as two vectors"
    parser.add_argument("--weights", type=options.path, metavar="FILE", help=weights)
    update = "lloyd, or ema: moving averages of mini-batches, which takes fewer iterations (%(default)s)"
    parser.add_argument("--update", type=options.one_of(*get_args(ClusterUpdate)), default="lloyd", help=update)
    batch = "vectors of a mini-batch with --update ema (16 K, or a sixteenth of all if that is more)"
    parser.add_argument("--batch-size", type=options.number(int, 1), metavar="N", help=batch)
    balance = "limit of a cluster's size, relative to the mean, such as 1.05 (none)"
    parser.add_argument("--balance", type=options.number(float, 1), metavar="RATIO", help=balance)
    distinct = "add a code that numbers the vectors of each identifier"
    parser.add_argument("--distinct", action="store_true", help=distinct)
    parser.add_argument("--seed", type=options.seed, default=0, help="seed of the initial codes (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda if available)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run with the same data and settings")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..clustering import ClusterSettings, cluster_file

    given = vars(arguments)
    settings = ClusterSettings(**{field.name: given[field.name] for field in dataclasses.fields(ClusterSettings)})
    device = options.device(arguments.device)
    with process_group(device):
        progress = _Progress(shown=rank() == 0)
        try:
            found = cluster_file(
                arguments.data,
                settings,
                arguments.out,
                name=arguments.name,
                weights=arguments.weights,
                distinct=arguments.distinct,
                resume=arguments.resume,
                device=device,
                progress=progress.show,
            )
        except KeyboardInterrupt:
            progress.end()
            if progress.shown:
                print(f"genperf: interrupted; the same command with --resume continues {arguments.out}.", file=sys.stderr)
            return 130
        finally:
            progress.end()
    if not progress.shown:
        return 0
    return print_result(json.dumps(found.report, indent=2) if arguments.json else _text(found.report, found.written))


class _Progress:
    """A line on stderr that each iteration replaces, if it is shown."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.open = False

    def show(self, progress: KMeansProgress) -> None:
        if not self.shown:
            return
        mean = float(progress.inertia) / float(progress.counts.double().sum())
        line = f"stage {progress.stage + 1}, iteration {progress.iteration}: mean squared distance {mean:.6g}"
        print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)
        self.open = True

    def end(self) -> None:
        if self.open:
            print(file=sys.stderr)
        self.open = False


def _text(report: dict[str, object], written: list[Path]) -> str:
    def each(key: str, form: str) -> str:
        values = report[key]
        assert isinstance(values, list)
        return ", ".join(format(value, form) for value in values)

    lines = {
        "vectors": f"{report['vectors']} of {report['dim']} dimensions, in {report['seconds']} s",
        "distance": f"{each('mean_squared_distance', '.5g')} (mean squared, after each stage)",
        # Codes of length 1, of the first stage with cosine, may be farther from the vectors than the mean of these: a share below 0.
        "explained": f"{re.sub(r'-[^ ,]*', 'none', each('explained', '.2%'))} of the variance",
        "largest": f"{each('largest_cluster', '.2f')} times the mean cluster",
        "empty codes": each("empty_codes", "d"),
        "identifiers": f"{report['distinct_identifiers']} distinct; {report['colliding_vectors']} vectors share theirs, "
        f"at most {report['most_of_one_identifier']} the same one",
        "written": ", ".join(map(str, written)),
    }
    return "\n".join(f"{name:<13}{text}" for name, text in lines.items())
