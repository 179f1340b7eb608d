"""The search against its rivals, timed in turn in one process: how many times faster, and whether that is what it is meant to be.

python benchmarks/search_ratios.py                    with the best instruction set of this processor
python benchmarks/search_ratios.py --isa x86-64-v4    without its matrix units

Standard normal float32; the codebook is packed in every call. Shortest wall times. Exits with 1 where a goal is missed.
"""

import argparse
import os

CHECKED_PRODUCTS = 2.5e9  # by float64: some seconds
EXTRA_MEGABYTES = 32
RIVALS = ("faiss", "torch.cdist+argmin", "vector-quantize-pytorch")
# N, K, D, and how many times faster than each rival.
GOALS = {
    (4096, 16384, 256): (7, 12, 40),
    (16384, 512, 64): (5, 15, 50),
    (8192, 8192, 32): (6, 35, 120),
    (4096, 1024, 256): (4, 6, 12),
    (4096, 16384, 8): (1.4, 20, 150),
    (32768, 8192, 4): (1.1, 15, 80),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set to load (the best one)")
    parser.add_argument("--threads", type=int, default=2, help="of every contender (%(default)s)")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ["GENPERF_ISA"] = arguments.isa  # read when genperf is imported

    import torch
    from measure import device_name
    from report import machine, markdown

    from genperf import _library

    torch.set_num_threads(arguments.threads)
    facts = {"device": device_name("cpu"), "threads": arguments.threads, "torch": torch.__version__, "genperf": _library.isa}
    print(f"{machine([facts])}; load {os.getloadavg()[0]:.2f}\n", flush=True)
    lines = []
    for (n, k, d), goals in GOALS.items():
        wanted = goals if _library.isa == "amx" else (1.2 if d <= 32 else 1.0, None, None)
        lines += compared(n, k, d, wanted)
    print(markdown(lines))
    raise SystemExit(any(line["reached"] == "no" for line in lines))


def compared(n: int, k: int, d: int, goals: tuple[float | None, ...]) -> list[dict[str, str]]:
    """The lines of one size: a ratio for each rival, rows that are wrong, and memory."""
    import pytest
    import torch
    from bench_nearest_code import CONTENDERS, checked_rows
    from measure import peak_extra_bytes
    from report import megabytes, milliseconds
    from turns import in_turn, verdict

    torch.manual_seed(0)
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    ours = CONTENDERS["genperf"].make(x, codebook, None)

    def line(what: str, value: str, other: str = "", ratio: str = "", goal: str = "", reached: bool | None = None) -> dict[str, str]:
        row = {"N, K, D": f"{n}, {k}, {d}", "": what, "genperf": value, "other": other, "ratio": ratio, "goal": goal}
        return {**row, "reached": verdict(reached)}

    rows, exact = checked_rows(x, codebook, CHECKED_PRODUCTS)
    wrong = int((ours()[rows] != exact).sum())
    extra = peak_extra_bytes(ours, "cpu")
    lines = [line(f"wrong rows of {len(rows)}", str(wrong), goal="0", reached=wrong == 0)]
    if extra is not None:
        held = megabytes({"extra_bytes": extra})
        lines.append(line("extra MB", held, goal=f"< {EXTRA_MEGABYTES}", reached=extra < EXTRA_MEGABYTES * 1e6))
    for rival, goal in zip(RIVALS, goals, strict=True):
        try:
            theirs = CONTENDERS[rival].make(x, codebook, None)
        except pytest.skip.Exception as reason:  # it is not installed
            print(f"{rival}: {reason}\n")
            continue
        mine, its = in_turn(ours, theirs)
        ratio = its / mine
        wanted = {} if goal is None else {"goal": f">= {goal}x", "reached": ratio >= goal}
        lines.append(line(f"ms, {rival}", milliseconds(mine * 1e3), milliseconds(its * 1e3), f"{ratio:.2f}x", **wanted))
    return lines


if __name__ == "__main__":
    main()
