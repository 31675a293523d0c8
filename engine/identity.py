"""Whose a checkpoint is: what makes it this run's, another's, or one that nobody may replace.

The flags say it themselves: `resume` in their metadata (`utils/flags.py`) is "identity" for what
makes another run, "warn" for what makes it compute something else, "free" for the rest; `score`
marks those that change the score of a given network, `step_0` those that only step 0 reads.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from argparser import Options
from dataset.catalog import get_spec
from engine.checkpoint import Difference, check_fits, differences, load
from engine.paths import (
    base_checkpoint,
    checkpoint_path,
    own_checkpoint,
    previous_checkpoint,
    result_key,
    setting,
    tested_checkpoint,
)
from methods.table import FLAGS as METHOD_FLAGS
from tasks import Task
from utils import distributed
from utils.checkpoint import checksum
from utils.errors import UserError
from utils.flags import OnResume, flags_of
from utils.results import LENGTHS, WEIGHTS, read_results, result_files

log = logging.getLogger(__name__)

# The step is part of the file's name, the task of its folder's; a shared step 0 serves several.
_PLACE = ("step", "task", "dataset")
_AT_STEP_0 = ("bce", "fix_bn", "freeze")  # what is left of a method there, see Method.at_step_0
_NETWORK = ("backbone", "output_stride", "norm_act")

NEW, CONCLUDED, DONE = "new", "concluded", "done"


def state_for_all(opts: Options) -> str:
    """`state` as rank 0 finds it: on unshared disks the others might see something else."""
    found = NEW
    with distributed.main_first():
        if distributed.is_main():
            found = state(opts)
    if distributed.any_process(found == DONE):
        return DONE
    return CONCLUDED if distributed.any_process(found == CONCLUDED) else NEW


def state(opts: Options) -> str:
    """What is there of a step: NEW, to be learned; CONCLUDED, learned and not tested; DONE.

    Raises UserError where learning would replace a finished step of other flags, or an interrupted
    one of another run.
    """
    if opts.restart or opts.test:
        return NEW
    spec = get_spec(opts.dataset, opts.data_root)
    task, shared = spec.task(opts.task), _is_shared(opts)
    path = base_checkpoint(opts, task) if shared else own_checkpoint(opts)
    if not path.exists():
        return NEW
    content = load(path, "move it away, or learn the step again with --restart")
    finished = content.get("finished", True)
    if "options" not in content:
        raise UserError(f"{path} is not of this program: move it away, or give another --name")
    check_fits(content, path, opts, task.steps[: opts.step + 1], spec.class_names)
    _refuse_other(content, path, opts, shared, finished)
    if not finished:
        if not opts.continue_ckpt:
            log.warning("%s is of an interrupted run: starting over (--continue_ckpt goes on)",
                        path)  # fmt: skip
        return NEW
    _refuse_other_teacher(content, path, opts, task)
    return DONE if _is_tested(content, path, opts) else CONCLUDED


def _is_shared(opts: Options) -> bool:
    """Whether the step is a step 0 that runs share under `--base`."""
    return opts.base is not None and opts.step == 0


def _is_tested(content: Mapping[str, Any], path: Path, opts: Options) -> bool:
    """Whether the stored result is of the weights that lie there, not of earlier ones.

    A step 0 that another task learned has its result there.
    """
    if path != own_checkpoint(opts):
        return True
    per_class, means = (_rows(file, opts) for file in _files(opts))
    weights = checksum(content["model_state"])  # rows of older programs do not say of which
    return bool(means) and any(row.get(WEIGHTS) in (None, weights) for row in per_class)


def _refuse_other_teacher(
    content: Mapping[str, Any], path: Path, opts: Options, task: Task
) -> None:
    """UserError where a finished step began from another step before than the one that is there."""
    learned_from = content.get("teacher_checksum")  # older programs kept none
    before, _ = previous_checkpoint(opts, task)
    if learned_from is None or not before.exists():
        return
    if learned_from != _weights_of(before, before.stat().st_mtime_ns):
        raise UserError(
            f"{path} was learned from another step {opts.step - 1} than {before}, which was "
            "replaced since: nothing was changed; give another --name, or learn it again with "
            "--restart"
        )


def _refuse_other(
    content: Mapping[str, Any], path: Path, opts: Options, shared: bool, finished: bool
) -> None:
    """UserError unless the step that lies there is the one that is asked for."""
    without: Collection[str] = _PLACE
    kinds: tuple[OnResume, ...] = ("identity", "warn") if finished else ("identity",)
    if shared:  # methods share what they have in common at step 0
        without = (*_PLACE, "method", "mask", *(n for n in METHOD_FLAGS if n not in _AT_STEP_0))
        check_importances(content, path, opts)
    found = differences(content, opts, kinds, without)
    images = opts.batch_size * distributed.world_size()
    if finished and content.get("images_per_iteration", images) != images:
        found.append(Difference("batch_size x processes", content["images_per_iteration"], images))
    if found:
        name, theirs, ours = found[0]
        kind = "a finished" if finished else "an interrupted"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{path} is of {kind} run with --{name} {theirs}, this command has {ours}{more}: "
            f"nothing was changed; give {'--base another name' if shared else 'another --name'}, "
            "or replace it with --restart"
        )


@cache
def _weights_of(path: Path, changed: int) -> int:
    """The checksum of a checkpoint's weights; `changed` is when the file was."""
    return checksum(load(path, "put back what was there")["model_state"])


def check_importances(content: Mapping[str, Any], path: Path, opts: Options) -> None:
    """UserError where a shared step 0 did not collect what this run's regulariser needs."""
    wanted = set((opts.method.regularizer or "").split(",")) - {""}
    if lacking := sorted(wanted - (content.get("regularizer") or {}).keys()):
        raise UserError(
            f"{path} collected no importances for {', '.join(lacking)}: give --base another name, "
            "or learn it again with --restart"
        )


def check_teacher(content: Mapping[str, Any], path: Path, opts: Options) -> None:
    """UserError unless the step before is this run's; with `--step_ckpt` a warning.

    Step 0 of a method is another's as well where they agree on what is left of them there.
    """
    without: Collection[str] = _PLACE
    if opts.step == 1:
        without = (*_PLACE, "method", "mask", *(n for n in METHOD_FLAGS if n not in _AT_STEP_0))
    for name, theirs, ours in differences(content, opts, ("identity",), without):
        what = f"{path} is of a run with --{name} {theirs}, this one has {ours}"
        if not opts.step_ckpt:
            raise UserError(
                f"{what}: give this run another {'--base' if opts.base else '--name'}, or name "
                "the file with --step_ckpt to start from it all the same"
            )
        log.warning("%s", what)


def stored_rows(opts: Options) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The step's rows of the two result files; None where one is missing."""
    per_class, means = (_rows(path, opts) for path in _files(opts))
    return (per_class[0], means[0]) if per_class and means else None


def _files(opts: Options) -> tuple[Path, Path]:
    return result_files(Path(opts.logdir), setting(opts))


def _rows(path: Path, opts: Options) -> list[dict[str, Any]]:
    """The step's rows of a result file, without their key; a shared step 0 is any method's."""
    key = asdict(result_key(opts))
    wanted = {k: v for k, v in key.items() if k != "method" or not _is_shared(opts)}
    rows = read_results(path) if path.exists() else []
    return [
        {name: value for name, value in row.items() if name not in key}
        for row in rows if wanted.items() <= row.items()
    ]  # fmt: skip


def stored_result(opts: Options) -> str:
    """A tested step's scores as the result files have them, a line each; empty where none are."""
    rows = stored_rows(opts)
    values, hidden = {} if rows is None else rows[0] | rows[1], (*LENGTHS, WEIGHTS)
    known = {n: v for n, v in values.items() if isinstance(v, float) and n not in hidden}
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:<{width}}  {value:.4f}" for name, value in known.items())


def to_be_tested(opts: Options) -> Options:
    """The options that test a step which was learned to its end.

    Going on with it does, and draws its summary as well; a shared step 0 may be another method's,
    which nothing goes on with.
    """
    if _is_shared(opts):
        return as_trained(replace(opts, test=True, continue_ckpt=False))
    return replace(opts, continue_ckpt=True, ckpt=None)


def as_trained(opts: Options) -> Options:
    """The options of a test: what changes a score is as in training, unless it was typed.

    The result is filed under what was tested: name, method and seed of the checkpoint, and what was
    typed otherwise than in training behind the name. Raises UserError where a flag was typed that
    makes it another run.
    """
    path = tested_checkpoint(opts, get_spec(opts.dataset, opts.data_root).task(opts.task))
    content = load(path, "train the step first, or name a checkpoint with --ckpt")
    if "options" not in content:
        return opts
    shared = _is_shared(opts) and not opts.ckpt
    for name, theirs, ours in differences(content, opts, ("identity",), _PLACE):
        if name in opts.typed and not shared:
            raise UserError(
                f"{path} is of a run with --{name} {theirs}, not {ours}: leave the flag out, or "
                "name another checkpoint"
            )
    trained = Options.from_record(content["options"])
    changes, suffix = _taken_from(trained, opts, content["options"])
    method = opts.method if shared else trained.method
    name = (trained.name if opts.ckpt else opts.name) + suffix
    if name != opts.name:
        log.info("the result is filed under %s", name)
    tested = replace(opts, **changes | {"method": method, "name": name, "ckpt": str(path)})
    own = checkpoint_path(tested, trained.name, opts.step)
    if opts.ckpt and not (own.exists() and path.samefile(own)):
        _keep_row(tested, checksum(content["model_state"]))
    return tested


def _keep_row(opts: Options, weights: int) -> None:
    """UserError where the test of a file from elsewhere would replace another network's result."""
    rows = stored_rows(opts)
    if rows is not None and rows[0].get(WEIGHTS, weights) != weights:
        raise UserError(
            f"the result of {opts.ckpt} would replace that of another network of the name "
            f"{opts.name}: file it elsewhere with --logdir"
        )


def _taken_from(
    trained: Options, opts: Options, known: Collection[str]
) -> tuple[dict[str, Any], str]:
    """What a test takes over from the training, and how its row is marked where it differs."""
    changes: dict[str, Any] = {}
    suffix = ""
    for entry in flags_of(Options):
        name, score = entry.name, bool(entry.metadata.get("score"))
        theirs, ours = getattr(trained, name), getattr(opts, name)
        matters = score or name in _NETWORK or entry.metadata["resume"] == "identity"
        guessed = name not in known and name not in opts.typed  # a default, not what was used
        settled = name == "method" or entry.metadata.get("step_0")  # by the caller; long ago
        if settled or guessed or not matters or theirs == ours:
            continue
        if name not in opts.typed:
            changes[name] = theirs
            log.info("--%s %s, as in training", name, theirs)
        elif score:
            suffix += f"+{name}={ours}"
            log.warning("tested with --%s %s, trained with %s", name, ours, theirs)
    return changes, suffix
