"""The command line: every flag is a typed field of `Options` or of a method (`methods/table.py`).

What follows from a command line stands in `engine/plans.py`. Nothing here imports torch, so that
`--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from platform import python_version
from typing import Any

from dataset.catalog import DATASETS, OWN
from methods.table import FLAGS as METHOD_FLAGS
from methods.table import METHODS, NO_METHOD, Method
from modules.structures import NORMS, STRIDES_AND_DILATIONS, STRUCTURES
from utils.flags import Parser, add_flags, flag, flags_of, number, per_step, several
from utils.version import VERSION

SYNONYMS = {"--overlapped": "--overlap"}  # typed by the reference's README
DEFAULT_SEED = 42
PROTOCOLS = ("mib", "plop")
_positive = number(float, 0, open_low=True)


def _free(default: Any, help: str, **settings: Any) -> Any:
    """A flag that does not change what is computed."""
    return flag(default, help, resume="free", **settings)


@dataclass(frozen=True)
class Options:
    """What one step of one run is to do. Flags that depend on others are resolved here."""

    name: str = _free(
        "Experiment", "names the checkpoint, the logs and the result rows; with several methods a "
        "prefix (by default the method's name and, if not 42, the seed; Experiment without a "
        "method)", group="run",
    )  # fmt: skip
    dataset: str = flag("voc", "folder = docs/own_data.md", choices=(*DATASETS, OWN), group="run")
    data_root: str = _free(
        "data", "folder that holds PascalVOC12, ADEChallengeData2016, ... (data/README.md), or "
        "dataset.json", group="run",
    )  # fmt: skip
    task: str = flag("19-1", "B-I: B classes, then I at a time; or a fixed name", group="run")
    step: int = flag("0", "steps to learn, one after the other: 2, 0-5, 0,2 or all", group="run")
    overlap: bool = flag(
        False, "overlapped setting (also --overlapped)", resume="identity", group="run"
    )
    partition: bool = flag(
        True, "each image of ade is of one step, as MiB's lists have it; --no_partition: an image "
        "is of all steps that --overlap, or its absence, gives it, as for other data",
        negatable=True, resume="identity", group="run",
    )  # fmt: skip
    method: Method = flag(
        None, "a row of terms, any case; several, joined by commas, share what they can of step 0: "
        + ", ".join(METHODS), parse=several(METHODS, upper=True), resume="identity", group="run",
    )  # fmt: skip
    recipe: str | None = _free(
        None, "fill in what the authors used and you did not set: 24 images in total, "
        "lr 0.01,0.001, 30 epochs (ade 60), crop 512; plop, for the papers from PLOP on, also "
        "--protocol plop, --ignore_void, with --overlap --no_partition, and on 10-1 without EWF "
        "--epochs 30,10", choices=("paper", "plop"), group="run",
    )  # fmt: skip
    base: str | None = _free(
        None, "share step 0: it is learned once under this name, for all runs and tasks",
        group="run",
    )  # fmt: skip
    restart: bool = _free(False, "learn steps again that are finished", group="run")
    step_ckpt: str | None = _free(
        None, "start the step from this checkpoint of the step before", group="run"
    )
    test: bool = _free(False, "evaluate a checkpoint, train nothing", group="run")
    ckpt: str | None = _free(
        None, "checkpoint for --test or --continue_ckpt instead of the run's own", group="run"
    )
    continue_ckpt: bool = _free(False, "go on with an interrupted run of this step", group="run")
    random_seed: int = flag(
        DEFAULT_SEED, "of weights and data", parse=number(int, 0, 2**63 - 1), resume="identity",
        group="run",
    )  # fmt: skip
    num_workers: int = _free(
        None, "data processes per process (default: as many as it has cores, at most 8)",
        parse=number(int, 0), group="run",
    )  # fmt: skip
    deterministic: bool = _free(False, "same bits every time on CUDA; slower", group="run")
    local_rank: int | None = _free(None, "set by the launcher", parse=number(int, 0), group="run")

    epochs: int = flag(
        30, "passes over a step's images; 'a,b': a at step 0, b later",
        parse=per_step(number(int, 1)), group="optimisation",
    )  # fmt: skip
    batch_size: int = _free(4, "images per process", parse=number(int, 1), group="optimisation")
    crop_size: int = flag(
        512, "side of a training crop, pixels", parse=number(int, 32), score=True,
        group="optimisation",
    )  # fmt: skip
    lr: float = flag(
        0.007, "initial learning rate; 'a,b': a at step 0, b later",
        parse=per_step(_positive), group="optimisation",
    )  # fmt: skip
    momentum: float = flag(
        0.9, "of SGD (Nesterov)", parse=number(float, 0, 1), group="optimisation"
    )
    weight_decay: float = flag(1e-4, "of SGD", parse=number(float, 0), group="optimisation")
    lr_policy: str = flag(
        "poly", "schedule, per iteration", choices=("poly", "step"), group="optimisation"
    )
    lr_power: float = flag(
        0.9, "exponent of the poly schedule", parse=_positive, group="optimisation"
    )
    lr_decay_step: int = flag(
        5000, "iterations between decays", parse=number(int, 1), group="optimisation"
    )
    lr_decay_factor: float = flag(
        0.1, "of the step schedule", parse=_positive, group="optimisation"
    )
    amp: str = flag(
        "auto", "mixed precision; auto: bf16 where the GPU has it, else fp16; off on CPU",
        choices=("auto", "bf16", "fp16", "off"), score=True, group="optimisation",
    )  # fmt: skip
    compile: bool = flag(
        False, "torch.compile student and teacher: minutes at the start, for long runs (the loss "
        "is compiled on CUDA in any case)", group="optimisation",
    )  # fmt: skip

    backbone: str = flag("resnet101", "the body", choices=tuple(STRUCTURES), group="model")
    output_stride: int = flag(
        16, "image pixels per logit pixel", parse=int, group="model",
        choices=tuple(sorted(STRIDES_AND_DILATIONS)),
    )  # fmt: skip
    norm_act: str = flag("iabn_sync", "normalisation and activation", choices=NORMS, group="model")
    pretrained: bool | str = flag(
        True, "ImageNet weights at step 0: a file, torchvision to fetch its own, or nothing for "
        "pretrained/<backbone>_iabn_sync.pth.tar", negatable=True, takes_value=True, group="model",
        resume="identity", step_0=True,
    )  # fmt: skip
    pooling: int = flag(
        None, "pooling window of the head in eval (default crop_size / output_stride)",
        parse=number(int, 1), score=True, group="model",
    )  # fmt: skip

    crop_val: bool = flag(
        True, "validate and test on centre crops", negatable=True, score=True, group="evaluation"
    )
    tta: bool = _free(
        False, "test once more, averaged over three scales and mirrored images",
        group="evaluation",
    )  # fmt: skip
    val_on_trainset: bool = flag(
        False, "validate and test on the whole train list", score=True, group="evaluation"
    )
    cross_val: bool = flag(
        False, "validate on a held-out fifth of the train list", group="evaluation"
    )
    mask: bool = flag(
        True, "old classes become background in training (--no_mask keeps them)",
        negatable=True, resume="identity", group="evaluation",
    )  # fmt: skip
    ignore_void: bool = flag(
        False, "pixels of no class (VOC's 255) are ignored in training; else they are background",
        negatable=True, resume="identity", group="evaluation",
    )  # fmt: skip
    protocol: str = flag(
        "mib", "of validations and tests. mib: pixels of classes to come and ade's label 0 do not "
        "count, old and all are means without background. plop: both count as background, old and "
        "all are means with it, images without a class seen so far are left out",
        choices=PROTOCOLS, score=True, group="evaluation",
    )  # fmt: skip
    val_interval: int = _free(
        1, "epochs between validations", parse=number(int, 1), group="evaluation"
    )
    ckpt_interval: int = _free(
        1, "epochs between checkpoints", parse=number(int, 1), group="evaluation"
    )

    logdir: str = _free("./logs", "where curves and result tables go", group="logging")
    visualize: bool = _free(True, "write TensorBoard files", negatable=True, group="logging")
    sample_num: int = _free(0, "panels per validation", parse=number(int, 0), group="logging")
    print_interval: int = _free(
        10, "iterations between log points", parse=number(int, 1), group="logging"
    )
    debug: bool = _free(False, "talk more, on every rank, with tracebacks", group="logging")
    wandb: bool = _free(False, "log to Weights & Biases as well", group="logging")
    wandb_project: str = _free("incremental-segmentation", "project there", group="logging")
    wandb_entity: str | None = _free(None, "team or user there", group="logging")

    typed: frozenset[str] = frozenset()  # the flags that the user typed; no flag itself

    def record(self) -> dict[str, Any]:
        """Flag -> value, those of the method beside the others: what a checkpoint keeps."""
        own = {entry.name: getattr(self, entry.name) for entry in flags_of(self)}
        name = None if self.method.name == NO_METHOD.name else self.method.name
        return {**own, "method": name, **self.method.flags()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Options:
        """The options of a `record`; flags that an older program did not write have defaults."""
        defaults: dict[str, Any] = {
            entry.name: entry.default for entry in flags_of(cls)
        } | NO_METHOD.flags()
        known = defaults | dict(record)
        row = METHODS.get(str(known["method"]), NO_METHOD)
        method = Method(row.name, row.paper, **{name: known[name] for name in METHOD_FLAGS})
        own = {entry.name: known[entry.name] for entry in flags_of(cls)}
        return cls(**own | {"method": method})


def get_parser() -> Parser:
    """The parser with all flags, grouped; defaults are those of the reference."""
    parser = Parser(
        "run.py",
        synonyms=SYNONYMS,
        description="Class-incremental semantic segmentation: learn steps of a task, or test them.",
        epilog="Exit status: 0 done; 1 failed, with a line that says why; 75 stopped by SIGTERM\n"
        "or Ctrl-C with a checkpoint written: the same command with --continue_ckpt goes on.",
    )
    version = f"run.py {VERSION} (Python {python_version()})"
    parser.add_argument("--version", action="version", version=version)
    groups: dict[str, list[Any]] = {}
    for entry in flags_of(Options):
        groups.setdefault(entry.metadata["group"], []).append(entry)
        if entry.name == "pooling":  # the last of the model's: a method's flags come next
            groups["terms (a method sets them; a flag given here wins)"] = list(flags_of(Method))
    for title, entries in groups.items():
        add_flags(parser.add_argument_group(title), entries)
    return parser
