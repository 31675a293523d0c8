"""What a checkpoint holds, and whether one is what a run asks for."""

from __future__ import annotations

import logging
from argparse import ArgumentTypeError
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from argparser import Options
from methods.table import METHODS, Method
from utils import checkpoint
from utils.checkpoint import first_not_finite, load_file, strip_module_prefix
from utils.errors import UserError
from utils.files import is_file_name
from utils.flags import OnResume, flags_of

log = logging.getLogger(__name__)

# What a step writes beside `model_state`, and of which type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "optimizer_state": dict,
    "scheduler_state": dict,
    "scaler_state": dict,
    "regularizer": (dict, type(None)),
    "regularizer_state": (dict, type(None)),
    "random_state": Tensor,
    "epoch": int,
    "iteration": int,
    "best_score": float,
    "images_per_iteration": int,
    "iterations_per_epoch": int,
    "total_iterations": int,
    "finished": bool,
    "steps": list,
    "options": dict,
}
# What older programs did not write, and a resume can do without.
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "objective_state": dict, "images_checksum": int, "teacher_checksum": int,
}  # fmt: skip


def load(path: Path, cure: str) -> dict[str, Any]:
    """Read a checkpoint of ours or of the reference on the CPU.

    The model's keys lose their `module.` prefix; of the reference's, which says nothing about
    itself, nothing but `model_state` is kept. Raises UserError, ending in `cure`, where the file is
    missing, damaged, of another layout, not a checkpoint, or holds values that are not finite.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: {cure}")
    content = load_file(path)
    state = content.get("model_state")
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(f"{path} is not a checkpoint of this program (no model_state): {cure}")
    if "version" not in content:
        content = {}
    elif type(content["version"]) is not int or content["version"] != checkpoint.VERSION:
        version = content["version"]
        raise UserError(f"{path} has layout version {version}, not {checkpoint.VERSION}: {cure}")
    if wrong := _wrong_field(content):
        raise UserError(f"{path} is damaged, its {wrong!r} cannot be one: {cure}")
    content["model_state"] = strip_module_prefix(state)
    if bad := first_not_finite(content):
        raise UserError(f"{path} holds values that are not finite, first in {bad}: {cure}")
    return content


def check_complete(content: Mapping[str, Any], path: Path, cure: str) -> None:
    """UserError, ending in `cure`, unless a loaded checkpoint holds all that a resume needs."""
    missing = [name for name in FIELDS if name not in content]
    if missing:
        raise UserError(f"{path} holds no {missing[0]!r} and cannot be resumed: {cure}")


class Difference(NamedTuple):
    """A flag that a checkpoint was written with and that is another now."""

    name: str
    theirs: Any
    ours: Any


def all_flags() -> list[Field[Any]]:
    """The flags of a run and of its method."""
    return [*flags_of(Options), *flags_of(Method)]


def differences(
    content: Mapping[str, Any], opts: Options, kinds: Iterable[OnResume],
    without: Collection[str] = (),
) -> list[Difference]:  # fmt: skip
    """Flags of the `kinds` that differ, by name; those unknown to an older file do not."""
    theirs, ours = content.get("options", {}), opts.record()
    asked = (f for f in all_flags() if f.metadata["resume"] in kinds and _applies(f, opts))
    names = sorted(entry.name for entry in asked)
    return [
        Difference(name, theirs[name], ours[name])
        for name in names
        if name not in without and name in theirs and theirs[name] != ours[name]
    ]


def _applies(entry: Field[Any], opts: Options) -> bool:
    """Whether the step reads a flag: some are for step 0 alone."""
    return opts.step == 0 or not entry.metadata.get("step_0")


def check_flags(content: Mapping[str, Any], path: Path, opts: Options) -> None:
    """Compare the flags of a resumed run with those that the checkpoint was written with.

    UserError where they make it another run (method, seed, terms); a warning in the log where they
    make it compute something else from here on.
    """
    for name, theirs, ours in differences(content, opts, ("identity",)):
        raise UserError(
            f"{path} is of a run with --{name} {theirs}, this one has {ours}: "
            "give this run another --name, or leave out --continue_ckpt"
        )
    for name, theirs, ours in differences(content, opts, ("warn",)):
        log.warning("%s was written with --%s %s, going on with %s", path, name, theirs, ours)


def check_fits(
    content: Mapping[str, Any],
    path: Path,
    opts: Options,
    steps: Sequence[Sequence[int]],
    class_names: Sequence[str],
) -> None:
    """UserError unless a checkpoint is of this data set, task, step and network.

    `steps` are the labels of the steps up to that of the checkpoint, `class_names` the names of the
    data set by label. Two tasks that agree up to there may share the file (15-5 and 15-5s share
    their step 0). The reference's checkpoints say nothing about themselves; for them the shapes of
    the weights must do.
    """
    theirs = content.get("options")
    if theirs is None:
        return
    stored = [list(labels) for labels in content["steps"]]
    agrees = stored == [list(labels) for labels in steps]
    # Own data has tasks that are the user's to change.
    changed = " with other steps" if theirs["task"] == opts.task else ""
    wrong = (
        ("dataset", theirs["dataset"], opts.dataset),
        ("step", len(stored) - 1, len(steps) - 1),
        ("backbone", theirs["backbone"], opts.backbone),
        ("output_stride", theirs.get("output_stride", opts.output_stride), opts.output_stride),
        # In-place norms take |w| + eps for w: the same weights are another network.
        ("norm_act", _family(theirs.get("norm_act", opts.norm_act)), _family(opts.norm_act)),
        ("task", opts.task if agrees else theirs["task"] + changed, opts.task),
    )
    for what, found, wanted in wrong:
        if found != wanted:
            raise UserError(
                f"{path} is of {what} {found}, but {what} {wanted} is asked for: name another "
                f"checkpoint or the {what} it was trained with"
            )
    if list(content.get("class_names", class_names)) != list(class_names):
        raise UserError(f"{path} is of other classes than this dataset's: name another checkpoint")


def _family(norm: str) -> str:
    """iabn or abn: what the same weights mean does not depend on synchronisation."""
    return "iabn" if norm.startswith("iabn") else "abn"


def _wrong_field(content: Mapping[str, Any]) -> str:
    """Name of a field of the wrong type or range; empty if there is none."""
    for name, kind in (FIELDS | OPTIONAL).items():
        value = content.get(name)
        if name in content and not isinstance(value, kind):
            return name
        if kind is int and isinstance(value, int) and value < 0:
            return name
    if "steps" in content and not _are_steps(content["steps"]):
        return "steps"
    names = content.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        return "class_names"
    labels = [label for step in content.get("steps", [[0]]) for label in step]
    if "class_names" in content and max(labels) >= len(names):
        return "class_names"
    return _wrong_option(content.get("options"), len(content.get("steps", [])))


def _are_steps(steps: list[Any]) -> bool:
    """Whether this is a list of lists of labels, all of them different."""
    if not steps or not all(isinstance(labels, list) and labels for labels in steps):
        return False
    labels = [label for step in steps for label in step]
    return all(type(label) is int and 0 <= label <= 255 for label in labels) and (
        len(set(labels)) == len(labels)
    )


def _wrong_option(options: dict[str, Any] | None, steps: int) -> str:
    """Name of an option that no command line could have set; empty if there is none."""
    if options is None:
        return ""
    if not all(isinstance(options.get(name), str) for name in ("dataset", "task", "backbone")):
        return "options"
    if not is_file_name(options.get("name", "-")):
        return "options.name"
    step, method = options.get("step", steps - 1), options.get("method")
    own = {
        "method": method is None or (isinstance(method, str) and method in METHODS),
        "step": type(step) is int and step >= 0 and steps in (0, step + 1),
    }
    for entry in all_flags():
        known = own.get(entry.name)
        right = known if known is not None else _could_be_typed(entry, options.get(entry.name))
        if entry.name in options and not right:
            return f"options.{entry.name}"
    return ""


def _could_be_typed(entry: Field[Any], value: Any) -> bool:
    """Whether a value is one that the flag can have."""
    about = entry.metadata
    if isinstance(entry.default, bool):
        return isinstance(value, bool) or (about["takes_value"] and isinstance(value, str))
    if value is None:
        return entry.default is None and entry.name != "pooling"
    if type(value) not in (str, int, float):
        return False
    try:
        read = about["parse"](str(value))
    except (ValueError, OverflowError, ArgumentTypeError):
        return False
    return bool(read == value) and (about["choices"] is None or value in about["choices"])
