"""Typed dataclass fields that are command-line flags as well, written once.

    @dataclass(frozen=True)
    class Options:
        epochs: int = flag(30, "passes over a step's images", parse=number(int, 1))

`add_flags` gives a parser one flag per field, with the field's default, help and choices.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal, NoReturn

from utils.errors import UserError, guess

# What a flag may do when a run goes on after an interruption: have another value without a word
# (nothing that is computed depends on it), with a warning (from here on something else is
# computed), or not at all (with another value it is another run).
OnResume = Literal["free", "warn", "identity"]


def flag(
    default: Any,
    help: str,
    *,
    resume: OnResume = "warn",
    parse: Callable[[str], Any] = str,
    choices: Collection[Any] | None = None,
    negatable: bool = False,
    takes_value: bool = False,
    **notes: Any,
) -> Any:
    """A dataclass field that `add_flags` turns into `--<name>`.

    A boolean default makes a switch, which `--no_<name>` turns off if it is `negatable`; with
    `takes_value` a text may stand behind it. `parse` turns the text behind any other flag into its
    value. `notes` are kept in the field's metadata.
    """
    about = {
        "help": help, "resume": resume, "parse": parse, "choices": choices, "negatable": negatable,
        "takes_value": takes_value,
    }  # fmt: skip
    return field(default=default, metadata=about | notes)


def is_flag(entry: Field[Any]) -> bool:
    """Whether a dataclass field was made by `flag`."""
    return "help" in entry.metadata and entry.default is not MISSING


def flags_of(kind: Any) -> tuple[Field[Any], ...]:
    """The fields of a dataclass that are flags."""
    return tuple(entry for entry in fields(kind) if is_flag(entry))


def add_flags(group: argparse._ArgumentGroup, entries: Sequence[Field[Any]]) -> None:
    """One flag per field."""
    for entry in entries:
        about = entry.metadata
        settings: dict[str, Any] = {"default": entry.default, "help": about["help"]}
        if not isinstance(entry.default, bool):
            settings |= {"type": about["parse"], "choices": about["choices"]}
        elif about["negatable"]:
            settings |= {"action": Switch, "nargs": "?" if about["takes_value"] else 0}
        else:
            settings["action"] = "store_true"
        group.add_argument(f"--{entry.name}", **settings)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with every default behind the text of its flag; descriptions stay as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        untold = action.required or action.default is argparse.SUPPRESS or "default" in text
        return text if untold else f"{text} (default: {shown(action.default)})".replace("%", "%%")


def shown(default: Any) -> str:
    """A default as help and docs show it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return " ".join(map(str, default))
    return "none" if default is None else str(default)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (UserError) and one spelling behind `-` and `_`.

    Args:
        prog: what a user types behind `python`, such as `run.py` or `-m dataset.check`.
        words: what follows it, in the one line of usage.
        synonyms: other spellings of whole flags, spelling -> flag.
    """

    def __init__(
        self, prog: str, *, words: str = "[flags]", synonyms: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        command = f"python {prog}"
        super().__init__(
            command, f"{command} {words}", allow_abbrev=False, formatter_class=Help, **settings
        )
        self._synonyms = synonyms or {}

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists every flag")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = [str(word) for word in args or ()]
        for word in words[: words.index("--") if "--" in words else None]:
            self._check_flag(word)
        return super().parse_known_args([self._canonical(word) for word in words], namespace)

    def _canonical(self, argument: str) -> str:
        """`--no-pretrained` -> `--no_pretrained`; values stay as they are, behind `=` too."""
        if not argument.startswith("--") or argument == "--":
            return argument
        name, equals, value = argument.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        return self._synonyms.get(name, name) + equals + value

    def _check_flag(self, word: str) -> None:
        """Error for what looks like a flag and is none, before other flags are missed for it."""
        name = self._canonical(word).partition("=")[0]
        known = self._option_string_actions
        if name in known or " " in word or not word.lstrip("-")[:1].isalpha() or word[0] != "-":
            return
        self.error(f"unknown flag {word.partition('=')[0]}{guess(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            text = f"{str(value)!r} is none of {', '.join(known)}{guess(str(value), known)}"
            raise argparse.ArgumentError(action, text)


class Switch(argparse.Action):
    """`--flag` turns on, `--no_flag` turns off; with nargs "?" `--flag TEXT` sets the text."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        name = option_strings[0]
        super().__init__([name, f"--no_{name[2:]}"], dest, **settings)

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        off = str(option_string).startswith("--no_")
        if off and values:
            parser.error(f"argument {option_string}: takes no value, not {values!r}")
        setattr(namespace, self.dest, not off and (values or True))


def number(
    kind: Callable[[str], Any], low: float, high: float = math.inf, open_low: bool = False
) -> Callable[[str], Any]:
    """A `parse` for finite numbers within [low, high], or (low, high] with `open_low`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            bounds = f"above {low}" if open_low else f"at least {low}"
            if high < math.inf:
                bounds += f", at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range ({bounds})")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def per_step(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A `parse` for one value, or for `first,later`: step 0 and the steps after it."""

    def pair(text: str) -> Any:
        first, comma, later = text.partition(",")
        return (convert(first), convert(later)) if comma else convert(first)

    pair.__name__ = convert.__name__
    return pair


def several(known: Collection[str], upper: bool = False) -> Callable[[str], Any]:
    """A `parse` for one or several of the `known` words, joined by commas, in any case."""

    def convert(text: str) -> str:
        words = (text.upper() if upper else text.lower()).split(",")
        for word, typed in zip(words, text.split(","), strict=True):
            if not word.strip():
                raise argparse.ArgumentTypeError("an empty name: a comma too many?")
            if word not in known:
                raise argparse.ArgumentTypeError(
                    f"{typed!r} is none of {', '.join(known)}{guess(word, known)}"
                )
        if len(set(words)) < len(words):
            raise argparse.ArgumentTypeError(f"{text!r} names one of them twice")
        return ",".join(words)

    return convert
