"""The plans of a command line, one after the other: each step built, resumed, fitted, tested."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from argparser import Options
from dataset.build import StepDatasets
from engine.announce import (
    announce_end,
    announce_model,
    announce_next,
    announce_step,
    announce_training,
)
from engine.build import Training, build_data, build_training, start_workers
from engine.comparison import collect
from engine.context import Context
from engine.fit import fit
from engine.identity import (
    CONCLUDED,
    DONE,
    as_trained,
    state,
    state_for_all,
    stored_result,
    to_be_tested,
)
from engine.journal import Journal
from engine.logs import TrainingLog, open_journal, open_logger
from engine.outcome import Tested, load_tested, test
from engine.paths import log_folder, own_checkpoint, setting
from engine.plans import Plan
from engine.resume import load_resumed
from engine.tables import as_text
from utils import distributed, workers
from utils.compiled import check_compiler, reset_compiler
from utils.errors import UserError, in_a_line
from utils.files import check_writable, followed
from utils.lock import run_lock
from utils.logger import Logger, setup_console
from utils.results import read_results, result_files
from utils.signals import INTERRUPTED, Interrupted, asked_to_stop, stop_requests

log = logging.getLogger(__name__)


def execute(plans: Sequence[Plan], argv: Sequence[str] = ()) -> int:
    """All plans of a command line, one after the other; returns the exit status."""
    debug = plans[0].opts.debug
    try:
        learn_all(plans, argv)
    except Interrupted as wish:
        log.info("interrupted: %s", wish)
        distributed.shutdown()
        return INTERRUPTED
    except KeyboardInterrupt:  # before a step, or between two: there is nothing to save
        print("interrupted", file=sys.stderr)
        distributed.shutdown(failed=True)
        return 128 + signal.SIGINT
    except (
        UserError, distributed.PeerStopped, RuntimeError, OSError, EOFError, MemoryError
    ) as error:  # fmt: skip
        if debug:
            log.exception("stopped")
        if not isinstance(error, distributed.PeerStopped):  # rank 0 says itself why it stopped
            line = explain(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
        # Frees the loader that was at work, and with it its workers: later, one that is still
        # starting would find its queues gone, and say so at length.
        error.__traceback__ = None
        distributed.shutdown(failed=True)
        return 1
    distributed.shutdown()
    return 0


def learn_all(plans: Sequence[Plan], argv: Sequence[str]) -> None:
    """Every plan that is not finished, then the table of the methods, if there are several.

    At the end the log says which command comes after this one, which `argv` are the flags of.
    """
    device = distributed.init(plans[0].opts.local_rank)
    use_true_float32()
    setup_console(distributed.rank(), plans[0].opts.debug)
    with distributed.main_first():
        for plan in plans if distributed.is_main() else ():
            check_end(plan.opts)
            state(plan.opts)
    for plan in plans:
        if is_done(plan.opts, alone=len(plans) == 1):
            continue
        asked = run_plan(plan, device)
        if asked and plan is not plans[-1]:
            raise Interrupted(f"after step {plan.opts.step}")
        free_memory(device)  # nothing of a step stays on the device when the next is built
    if len({plan.opts.method.name for plan in plans}) > 1 and distributed.is_main():
        print_comparison([plan.opts for plan in plans])
    if distributed.is_main():
        announce_next(plans[-1].opts, argv, tested=plans[0].opts.test)


def is_done(opts: Options, alone: bool) -> bool:
    """Whether a step was learned and tested before; then its stored result is shown."""
    if state_for_all(opts) != DONE:
        return False
    log.info("step %d of %s is finished: skipped (--restart learns it again)", opts.step, opts.name)
    if alone and distributed.is_main():
        print(stored_result(opts), flush=True)
    return True


def check_end(opts: Options) -> None:
    """UserError where what is written at the end of a step could not be."""
    results = result_files(Path(opts.logdir), setting(opts))
    for path in results:
        if path.exists():
            read_results(path)
    folders = [*{followed(path).parent for path in results}, log_folder(opts)]
    for folder in folders if opts.test else [*folders, own_checkpoint(opts).parent]:
        check_writable(folder)


def use_true_float32() -> None:
    """float32 is float32 everywhere: in products, where some containers ask for TF32, and in
    convolutions, where TF32 is torch's default. What may be coarser is for `--amp` to say.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def run_plan(plan: Plan, device: torch.device) -> bool:
    """Train the step unless `--test`, then test it.

    Raises Interrupted if asked to stop. Returns whether it was asked too late, in the step's last
    moments: then the step is done and the next one is not to begin.
    """
    opts = as_trained(plan.opts) if plan.opts.test else plan.opts
    for note in plan.notes:
        log.info(note)
    with ExitStack() as stack:
        context = Context.of(opts, device)
        prepare_process(opts, device)
        start_workers(context)
        with distributed.main_first():
            hold_lock(stack, opts)
            data = build_data(context)
        found = state_for_all(opts)  # again: another run may have held the lock meanwhile
        if found == DONE:
            log.info("step %d of %s was finished meanwhile", opts.step, opts.name)
            return False
        if found == CONCLUDED:  # learned, and stopped before its result was written
            opts = to_be_tested(opts)
            context = replace(context, opts=opts)
        stack.enter_context(stop_requests())
        announce_step(context, data)
        journal = open_journal(opts)
        if opts.test:
            tested = load_tested(context)
            announce_model(context, tested.model)
            logger = stack.enter_context(open_logger(opts, None))
        else:
            training = build_training(context, data, load_resumed(context))
            logger = stack.enter_context(open_logger(opts, training.learner.scheduler.last_epoch))
            tested = learn(context, training, data, logger, journal)
        test(context, tested, data, logger, journal)
        announce_end(opts)
        return distributed.any_process(asked_to_stop())


def learn(
    context: Context, training: Training, data: StepDatasets, logger: Logger, journal: Journal
) -> Tested:
    """Train what is left of a step; returns what is to be tested."""
    announce_model(context, training.student)
    announce_training(context, training)
    progress, iterations = training.progress, training.batches.iterations_per_epoch
    known = journal.go_on(progress.epoch, progress.iteration)
    images = len(data.val), len(data.test)
    told = TrainingLog(
        context, logger, journal, iterations=iterations, images=images, current=known
    )
    fit(context, training, data, told)
    done = training.learner.scheduler.last_epoch
    return Tested(training.student, done, context.opts.method.bce)


def prepare_process(opts: Options, device: torch.device) -> None:
    """What flags change about the process as a whole. Raises UserError without a compiler."""
    if opts.deterministic:
        distributed.be_deterministic()
    if opts.compile and not opts.test:
        check_compiler(device)


def hold_lock(stack: ExitStack, opts: Options) -> None:
    """On rank 0 of a run that trains: no second run writes the same checkpoint meanwhile."""
    if distributed.is_main() and not opts.test:
        path = own_checkpoint(opts)
        what = f"step {opts.step} of {opts.name!r} ({setting(opts)})"
        stack.enter_context(run_lock(path.with_name(f".{path.name}.lock"), what))


def free_memory(device: torch.device) -> None:
    """Give back what the step before held: objects, device memory, compiled shapes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    reset_compiler()


def print_comparison(runs: Sequence[Options]) -> None:
    """The table of several methods, out of the result file they share."""
    per_class, _ = result_files(Path(runs[0].logdir), setting(runs[0]))
    names = {opts.name for opts in runs}
    table = {
        about: [row for row in rows if row.runs[0].name in names]
        for about, rows in collect([per_class]).items()
    }
    print(f"\n{as_text(table)}", flush=True)


def explain(error: Exception) -> str | None:
    """What happened and what to do, in a line; None for what no user can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has no memory left: lower --batch_size, or see docs/questions.md"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "no memory left: lower --crop_size, --batch_size or --num_workers"
    if distributed.lost_peer(error):
        return "another process of this run is gone, see what it said"
    if workers.lost(error):
        return "a data worker was killed, as a rule for want of memory: lower --num_workers"
    if "Too many open files" in str(error):
        return "no more files may be opened: raise the limit (ulimit -n), or lower --num_workers"
    if isinstance(error, OSError) and error.strerror:
        return f"{in_a_line(error)}; --debug shows where in the program"
    return None
