"""Where curves, tables and pictures go: TensorBoard and Weights & Biases, known nowhere else.

Also the console: log lines that leave a progress bar in one piece.
"""

from __future__ import annotations

import html
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from utils.errors import UserError, printable
from utils.files import atomic_write
from utils.pictures import save_png

# Libraries that tell their inner life at DEBUG, one line per chunk of a PNG for instance.
CHATTY = ("PIL", "wandb", "urllib3", "git")


@dataclass(frozen=True)
class WandbOptions:
    """Where a run appears in Weights & Biases; `run_id` continues that very run."""

    project: str
    entity: str | None = None
    group: str | None = None
    run_id: str | None = None


class Logger:
    """Writes to TensorBoard, and to wandb if asked; does nothing unless `enabled` (rank 0).

    One count of steps serves all methods and never decreases, for wandb drops what lies before its
    latest step. Every run of a step of a task has a `logdir` of its own.

    Args:
        logdir: made if missing. Holds the TensorBoard events and, in `wandb_id`, the wandb run.
        name: the run's name in wandb.
        config: options of the run, shown as a text card (TensorBoard) and as its config (wandb).
        resume_step: after an interruption, the first step that will be logged again: what stands
            in `logdir` from there on disappears from TensorBoard, and wandb goes on with the run
            it has there. 0 starts over: new curves, new wandb run; a run that may be resumed
            begins with it. None adds to all that is there, as a test after the training does.

    Raises:
        UserError: `logdir` cannot be written; wandb is asked for and missing or does not start.
    """

    def __init__(
        self,
        logdir: Path,
        *,
        enabled: bool = True,
        tensorboard: bool = True,
        wandb: WandbOptions | None = None,
        name: str = "",
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._sinks: list[_Sink] = []
        self._pictures = logdir / "images" if enabled else None
        if not enabled:
            return
        config = config or {}
        try:
            logdir.mkdir(parents=True, exist_ok=True)
            if wandb:
                self._sinks.append(_Wandb(logdir, wandb, name, config, resume_step))
            if tensorboard:
                self._sinks.append(_TensorBoard(logdir, config, resume_step))
        except OSError as error:
            raise UserError(
                f"cannot write logs to {logdir} ({error.strerror}): choose another --logdir"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves by tag; nan (nothing to measure) leaves a gap."""
        known = {tag: float(value) for tag, value in values.items() if not math.isnan(value)}
        for sink in self._sinks:
            sink.scalars(known, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture, uint8 H W 3. The latest of a tag also lies at `<logdir>/images/<tag>.png`."""
        for sink in self._sinks:
            sink.image(tag, image, step)
        if self._pictures:
            save_png(self._pictures / f"{tag}.png", image)

    def table(
        self, tag: str, header: Sequence[str], rows: Sequence[Sequence[object]], step: int
    ) -> None:
        """A table with a title row."""
        for sink in self._sinks:
            sink.table(tag, header, rows, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text card; wandb shows the markdown as it stands."""
        for sink in self._sinks:
            sink.text(tag, markdown, step)

    def flush(self) -> None:
        """Brings TensorBoard's events to disk: call it with a checkpoint, and a kill loses none."""
        for sink in self._sinks:
            sink.flush()

    def close(self, *, failed: bool = False) -> None:
        """Ends the logging; further calls do nothing. `failed` marks the run in wandb."""
        sinks, self._sinks, self._pictures = self._sinks, [], None
        for sink in sinks:
            sink.close(failed)

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


class _Sink(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, tag: str, image: np.ndarray, step: int) -> None: ...

    def table(
        self, tag: str, header: Sequence[str], rows: Sequence[Sequence[object]], step: int
    ) -> None: ...

    def text(self, tag: str, markdown: str, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, logdir: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and only rank 0 needs it

        self._folder = logdir
        _keep_quiet_about_disks()
        # The mark of a start at 0 matters: TensorBoard drops nothing at the first mark it meets.
        self._writer = SummaryWriter(str(logdir), purge_step=resume_step, flush_secs=30)
        if config:
            self.table("options", ["option", "value"], list(config.items()), resume_step or 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            with self._one_line():
                self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        with self._one_line():
            self._writer.add_image(tag, image, step, dataformats="HWC")

    def table(
        self, tag: str, header: Sequence[str], rows: Sequence[Sequence[object]], step: int
    ) -> None:
        self.text(tag, _markdown_table(header, rows), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        with self._one_line():
            self._writer.add_text(tag, markdown, step)

    def flush(self) -> None:
        with self._one_line():
            self._writer.flush()

    def close(self, failed: bool) -> None:
        try:
            with self._one_line():
                self._writer.close()
        except UserError:
            if not failed:
                raise

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """TensorBoard's thread hands on what stopped it, as a rule a full disk."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write logs to {self._folder} ({error.strerror or error}): make room, "
                "choose another --logdir, or use --no_visualize"
            ) from error


def _keep_quiet_about_disks() -> None:
    """Keep tracebacks of TensorBoard's thread from the terminal: the main thread says it."""
    if threading.excepthook is threading.__excepthook__:

        def hook(args: Any) -> None:
            if not isinstance(args.exc_value, OSError):
                threading.__excepthook__(args)

        threading.excepthook = hook


class _Wandb:
    def __init__(
        self,
        logdir: Path,
        options: WandbOptions,
        name: str,
        config: Mapping[str, Any],
        resume_step: int | None,
    ) -> None:
        id_file = logdir / "wandb_id"
        stored = id_file.read_text().strip() if resume_step != 0 and id_file.exists() else ""
        try:
            import wandb

            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                group=options.group,
                id=options.run_id or stored or None,
                name=name or None,
                config=dict(config),
                dir=str(logdir),
                resume="allow",
            )
        except ImportError as error:
            raise UserError(
                f"--wandb: no wandb here ({error}): pip install wandb, or leave the flag out"
            ) from error
        except Exception as error:  # whatever it is: no login, no network, a wrong setting
            raise UserError(
                f"--wandb: wandb does not start ({error}): "
                "run `wandb login`, or set WANDB_MODE=offline, or leave the flag out"
            ) from error
        self._wandb = wandb
        with atomic_write(id_file) as file:
            file.write(self._run.id.encode())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image(image)}, step=step)

    def table(
        self, tag: str, header: Sequence[str], rows: Sequence[Sequence[object]], step: int
    ) -> None:
        table = self._wandb.Table(columns=list(header), data=[list(row) for row in rows])
        self._run.log({tag: table}, step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        page = self._wandb.Html(f"<pre>{html.escape(markdown)}</pre>", inject=False)
        self._run.log({tag: page}, step=step)

    def flush(self) -> None:
        """Nothing to call: wandb's own process writes every few seconds; a kill loses the last."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [
        [printable(str(cell).replace("\n", " ")).replace("|", "\\|") for cell in line]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


class _Console(logging.Handler):
    """Writes to whatever sys.stdout is at the time, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = "\n".join(map(printable, self.format(record).split("\n")))
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()  # a killed run leaves its lines in the file they were sent to
        except Exception:
            self.handleError(record)


def setup_console(rank: int = 0, debug: bool = False) -> None:
    """Sends the log records of this process to stdout; calling it again replaces the settings.

    Rank 0 tells from INFO on, the others from WARNING on. With `debug` every rank tells all. Lines
    carry the rank when more than rank 0 can be expected to speak.
    """
    handler = _Console()
    prefix = f"[rank {rank}] " if debug or rank else ""
    line = f"{prefix}%(asctime)s %(levelname).1s %(message)s"
    handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [old for old in root.handlers if not isinstance(old, _Console)] + [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING if rank else logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
