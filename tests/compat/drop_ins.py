# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/drop-ins.md: every class, option and method of the libraries that genperf.compat replaces.

python tests/compat/drop_ins.py writes them to the page. tests/compat/test_drop_ins.py compares the page and the signatures; the options of
vector-quantize-pytorch are in vqp_cases.py.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import vqp_cases

from genperf.compat import diffusers, pytorch_fid, taming, torcheval
from genperf.compat import vector_quantize_pytorch as vqp

PAGE = Path(__file__).parents[2] / "docs" / "drop-ins.md"
WORKS, DIFFERS, PLAIN, MISSING = "as upstream", "differs", "plain PyTorch", "missing"
STATUSES = (WORKS, DIFFERS, PLAIN, MISSING)

# The options that a class takes as **kwargs are those of another one.
FORWARDED = {
    "ResidualVQ": "VectorQuantize",
    "RandomProjectionQuantizer": "VectorQuantize",
    "GroupedResidualVQ": "ResidualVQ",
    "ResidualSimVQ": "SimVQ",
    "ResidualFSQ": "FSQ",
    "GroupedResidualFSQ": "ResidualFSQ",
    "ResidualLFQ": "LFQ",
    "GroupedResidualLFQ": "ResidualLFQ",
    "EvoLFQ": "LFQ",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A class or function of a library, and what is to be said of its options and methods, by name; methods end with "()"."""

    path: str  # module:name of upstream
    genperf: Any = None  # None: missing
    methods: tuple[str, ...] = ()
    differs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plain: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)  # attributes that are left out
    instead: str = ""  # of what is missing as a whole

    @property
    def name(self) -> str:
        return self.path.rpartition(":")[2]

    def options(self) -> list[str]:
        """Options of constructor and forward, or arguments of a function, then methods."""
        if self.genperf is None:
            return []
        return [*signature_options(self.genperf), *(f"{name}()" for name in self.methods), *self.missing]

    def statuses(self, option: str) -> list[str]:
        """What the table says of an option; "" is the class."""
        notes = {DIFFERS: self.differs, PLAIN: self.plain, MISSING: self.missing}
        found = [status for status, by_option in notes.items() if option in by_option]
        return found or [PLAIN if "" in self.plain else WORKS]

    def note(self, option: str) -> str:
        return "; ".join(notes[option] for notes in (self.differs, self.plain, self.missing) if notes.get(option))


@dataclasses.dataclass(frozen=True)
class Library:
    name: str
    version: str
    entries: Callable[[], list[Entry]]

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}".strip()


def signature_options(owner: Any) -> list[str]:
    """Names of the options of a class and its forward, without the input, or of a function's arguments."""
    parameters = list(inspect.signature(owner).parameters.values())
    if inspect.isclass(owner) and hasattr(owner, "forward"):
        parameters += list(inspect.signature(owner.forward).parameters.values())[2:]
    names = (f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return list(dict.fromkeys(names))


def of_vector_quantize_pytorch() -> list[Entry]:
    def notes_of(name: str, notes: Mapping[tuple[str, str], str]) -> dict[str, str]:
        return {option: note for (owner, option), note in notes.items() if owner == name}

    entries = []
    for name in [*vqp.__all__, *(owner for owner, option in vqp_cases.UNSUPPORTED if not option)]:
        differs, plain, unsupported, without = (
            notes_of(name, each) for each in (vqp_cases.DIFFERS, vqp_cases.PLAIN, vqp_cases.UNSUPPORTED, vqp_cases.WITHOUT)
        )
        instead = unsupported.pop("", "")
        entry = Entry(f"vector_quantize_pytorch:{name}", getattr(vqp, name, None), (), differs, plain, unsupported, without, instead)
        entries.append(entry)
    return sorted(entries, key=lambda entry: vqp_order().index(entry.name))


def vqp_order() -> list[str]:
    """The classes in the order of the cases."""
    return list(dict.fromkeys([*(case.name for case in vqp_cases.CASES), *(owner for owner, _ in vqp_cases.UNSUPPORTED)]))


REMAPPING = {"remap": "neither synchronizes with the device nor changes indices in place"}
REMAPPED = ("get_codebook_entry", "remap_to_used", "unmap_to_all")


def of_taming() -> list[Entry]:
    module = "taming.modules.vqvae.quantize"
    return [
        Entry(
            f"{module}:VectorQuantizer",
            taming.VectorQuantizer,
            ("get_codebook_entry",),
            {"": "`min_encodings` in the returned tuple is None", "get_codebook_entry()": "indices of any shape with shape=None"},
        ),
        Entry(
            f"{module}:VectorQuantizer2",
            taming.VectorQuantizer2,
            REMAPPED,
            {**REMAPPING, "get_codebook_entry()": "indices of any shape with shape=None"},
        ),
        Entry(
            f"{module}:GumbelQuantize",
            taming.GumbelQuantize,
            REMAPPED,
            {
                **REMAPPING,
                "temp": "0 gives hard codes, not NaN",
                "temp_init": "`temperature` is a tensor",
                "straight_through": "other samples of a seed",
            },
        ),
        Entry(f"{module}:EMAVectorQuantizer", instead="`nn.VectorQuantizer(decay=...)`"),
    ]


def of_diffusers() -> list[Entry]:
    module = "diffusers.models.autoencoders.vae"
    return [
        Entry(f"{module}:VectorQuantizer", diffusers.VectorQuantizer, REMAPPED, REMAPPING),
        Entry(
            f"{module}:DiagonalGaussianDistribution",
            diffusers.DiagonalGaussianDistribution,
            ("sample", "kl", "nll", "mode"),
            {
                "deterministic": "`kl()` and `nll()` are zeros [B] on its device; takes effect when it is set later too",
                "sample()": "other noise of a generator, unless `torch_noise = True`",
                "kl()": "[B] for latents of every rank; float32 in half precision",
                "nll()": "by default over all dimensions but the first; float32 in half precision",
            },
        ),
        Entry(f"{module}:IdentityDistribution", instead="it computes nothing"),
    ]


def of_pytorch_fid() -> list[Entry]:
    module, command = "pytorch_fid.fid_score", "`genperf fid`"
    return [
        Entry(
            f"{module}:calculate_frechet_distance",
            pytorch_fid.calculate_frechet_distance,
            (),
            {
                "mu1": "numbers in place of arrays raise AssertionError",
                "sigma1": "singular covariances are exact",
                "eps": "accepted, not used",
            },
        ),
        *(
            Entry(f"{module}:{name}", instead=instead)
            for name, instead in (
                ("calculate_fid_given_paths", "`genperf fid A B`"),
                ("save_fid_stats", "`genperf fid --save-stats A.npz A`"),
                ("compute_statistics_of_path", "`metrics.FrechetReference.load`"),
                ("calculate_activation_statistics", "`metrics.FeatureMoments`"),
                ("get_activations", command),
            )
        ),
    ]


def of_torchmetrics() -> list[Entry]:
    from genperf.compat import torchmetrics

    return [
        Entry(
            "torchmetrics.image.fid:FrechetInceptionDistance",
            torchmetrics.FrechetInceptionDistance,
            ("update", "compute", "reset", "set_dtype", "plot"),
            {"compute()": "fewer samples than features, half precision, and loaded states work; never negative"},
        ),
        Entry("torchmetrics.image.kid:KernelInceptionDistance", instead="`metrics.KernelInceptionDistance`"),
    ]


def of_torcheval() -> list[Entry]:
    return [
        Entry(
            "torcheval.metrics:FrechetInceptionDistance",
            torcheval.FrechetInceptionDistance,
            ("update", "compute", "merge_state", "reset", "state_dict", "load_state_dict", "to"),
            {
                "model": "None: `update` takes features",
                "compute()": "fewer samples than features work; one image raises RuntimeError; never negative",
                "state_dict()": "float64",
            },
        ),
    ]


LIBRARIES = [
    Library("vector-quantize-pytorch", "1.32", of_vector_quantize_pytorch),
    Library("taming-transformers", "", of_taming),
    Library("diffusers", "0.42", of_diffusers),
    Library("pytorch-fid", "0.3", of_pytorch_fid),
    Library("torchmetrics", "1.9", of_torchmetrics),
    Library("torcheval", "0.0.7", of_torcheval),
]


def counted(entries: list[Entry]) -> list[int]:
    """The number of options with each status, the first one where there are several."""
    found = [entry.statuses(option)[0] for entry in entries for option in entry.options()]
    return [found.count(status) for status in STATUSES]


def described(entry: Entry) -> str:
    """A class: its options without a note in a sentence, the others in a table."""
    noted = [option for option in entry.options() if entry.note(option)]
    others = ", ".join(f"`{option}`" for option in entry.options() if option not in noted)
    plain = entry.plain.get("")
    sentences = [f"{'As upstream' if plain is None else f'Plain PyTorch ({plain})'}: {others}"] if others else []
    if entry.name in FORWARDED:
        sentences.append(f"By keyword also the options of `{FORWARDED[entry.name]}`")
    if "" in entry.differs:
        sentences.append(f"Differs: {entry.differs['']}")
    for reason in dict.fromkeys(entry.without.values()):
        names = ", ".join(f"`{name}`" for name, why in entry.without.items() if why == reason)
        sentences.append(f"Without {names}: {reason}")
    text = f"#### `{entry.name}`\n\n" + wrapped(" ".join(f"{sentence}." for sentence in sentences))
    if noted:
        rows = [f"| `{option}` | {', '.join(entry.statuses(option))} | {entry.note(option)} |" for option in noted]
        text += "\n\n" + "\n".join(["| option | | |", "|---|---|---|", *rows])
    return text


def missing(entries: list[Entry]) -> list[str]:
    """A table of what is missing as a whole."""
    rows = [f"| `{entry.name}` | {entry.instead} |" for entry in entries if entry.genperf is None]
    return ["\n".join(["| missing | instead |", "|---|---|", *rows])] if rows else []


def wrapped(text: str, width: int = 140) -> str:
    """Break lines between words; a word is what has no space outside of backticks."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def summary() -> str:
    lines = [f"| library | classes and functions | {' | '.join(STATUSES)} |", f"|{'---|' * (len(STATUSES) + 2)}"]
    for library in LIBRARIES:
        entries = library.entries()
        whole = sum(entry.genperf is not None for entry in entries)
        classes = str(whole) if whole == len(entries) else f"{whole} of {len(entries)}"
        link = f"[{library.title}](#{anchor('Options of ' + library.title)})"
        lines.append(f"| {link} | {classes} | {' | '.join(map(str, counted(entries)))} |")
    return "\n".join(lines)


def tables() -> str:
    blocks = []
    for library in LIBRARIES:
        entries = library.entries()
        blocks += [
            f"### Options of {library.title}",
            *(described(entry) for entry in entries if entry.genperf is not None),
            *missing(entries),
        ]
    return "\n\n".join(blocks)


def anchor(heading: str) -> str:
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_ ").replace(" ", "-")


def rendered(page: str) -> str:
    """The page with its summary and its tables."""
    for name, text in (("summary", summary()), ("tables", tables())):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = page.split(start)
        page = f"{head}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
