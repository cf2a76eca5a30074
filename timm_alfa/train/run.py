"""The command: parse, assemble, train epoch by epoch, and leave a folder with checkpoints, records and an export."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm import utils
from timm.utils.distributed import world_info_from_env

from ..errors import DataError, NonFiniteError, UsageError, data_problem, end_without_reader
from ..export import CONFIG_FILE, WEIGHTS_FILE, export_checkpoint
from ..report.plot import draw
from ..run_folder.environment import describe_run
from ..run_folder.output import MetricLog, open_output, read_record, snapshot
from ..utils.distributed import leave_group
from ..utils.text import one_line
from .arguments.command_line import parse_args
from .build import Plan, assemble, check_inputs, list_blocks
from .checkpoints.resume_flags import settle_flags
from .checkpoints.saver import CheckpointError, TrainCheckpointSaver, gather_random_states
from .device import lost_process
from .dry_run import dry_run
from .evaluate import validate
from .final_test import TEST_FILE, best_checkpoint, test_best_checkpoint
from .finite import check_weights
from .log import setup_logging
from .loop import ReportingTask, prepare_batch, train_one_epoch
from .robust import attack_exported, is_attacked

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the training command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 after a user's mistake, 1 when a file cannot be written, images cannot be read or numbers are no
            longer finite, 130 after an interrupt.
    """
    setup_logging(primary=world_info_from_env()[1] == 0)
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        train(parse_args(argv), command=shlex.join(["train_alfa.py", *argv]))
    except UsageError as error:
        _fail(str(error), code=2)
    except (CheckpointError, NonFiniteError) as error:
        _fail(str(error), code=1)
    except DataError as error:
        _fail(data_problem(error), code=1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        end_without_reader()
    except RuntimeError as error:
        if not lost_process(error):
            raise
        _fail(
            f"another of the {world_info_from_env()[2]} processes is gone ({one_line(error)}); "
            "--resume auto goes on from the last checkpoint",
            code=1,
        )
    except OSError as error:  # the disk is full, the folder has gone, ...
        if error.errno is None:
            raise
        _fail(f"{error.filename or 'a file of the run'}: {error.strerror}; the checkpoints written are intact", code=1)
    finally:
        leave_group()


def _fail(message: str, *, code: int) -> NoReturn:
    rank = world_info_from_env()[1]
    if rank > 0:
        # The first rank tells what all of them found, and its end makes the launcher end this process too. One that
        # outlives it has met a mistake of its own.
        time.sleep(10)
    print(f"train_alfa.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def train(args: argparse.Namespace, *, command: str) -> None:
    """Does what parsed flags ask for.

    Args:
        args: The flags.
        command: How they were given, for the record.

    Raises:
        UsageError: Before anything is written.
        CheckpointError: A checkpoint cannot be written; earlier ones are intact.
        NonFiniteError: A loss, feature, perturbation or weight is infinite or not a number.
        DataError: Image after image does not decode.
    """
    config = snapshot(args)
    args.prefetcher = not args.no_prefetcher
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    resume_path, checkpoint = check_inputs(args)
    if args.alfa_list_blocks:
        list_blocks(args)
        return
    if checkpoint is not None:
        config |= settle_flags(args, resume_path, checkpoint)
    plan = assemble(args, resume_path, checkpoint)
    del checkpoint
    if args.alfa_dry_run:
        run = plan.run

        def epoch() -> Iterator[Any]:
            return (prepare_batch(run, images, target) for images, target in run.loader)

        dry_run(args, run.task, epoch, device=run.device, amp_autocast=run.precision.autocast, optimizer=run.optimizer)
    elif plan.start_epoch < plan.stop_epoch:
        _train_and_export(plan, config, command)
    else:
        _logger.info(f"Nothing left to do: epoch {plan.start_epoch} of {plan.stop_epoch} is reached already.")
        folder = Path(plan.resume_path).parent
        if plan.resume_path and utils.is_primary(args) and not _is_exported(folder):
            _export(plan, folder)  # the run was killed between its last checkpoint and the end of the export
        tested = read_record(folder / TEST_FILE).get("split") == args.test_split
        if plan.resume_path and plan.test_loader is not None and not tested:
            _test(plan, folder)
        if plan.resume_path and utils.is_primary(args) and not is_attacked(plan, folder):
            attack_exported(plan, folder)


def _train_and_export(plan: Plan, config: dict[str, Any], command: str) -> None:
    run, args = plan.run, plan.run.args
    log = None
    late = [count for count in args.save_epochs if count > plan.num_epochs]
    if late:
        _logger.warning(f"--save-epochs {late}: never reached, the schedule has {plan.num_epochs} epochs")
    if utils.is_primary(args):
        environment = describe_run(command, run.device, processes=args.world_size)
        side = plan.data_config["input_size"][-1]
        run.folder = open_output(args, config, environment, side=side, resume_path=plan.resume_path)
        run.saver = _create_saver(plan, run.folder)
        log = MetricLog(args, run.folder, config, plan.start_epoch)
    results: list[dict[str, Any]] = []
    interrupted = False
    try:
        for epoch in range(plan.start_epoch, plan.stop_epoch):
            results += _run_epoch(plan, epoch, log)
    except KeyboardInterrupt:
        interrupted = True
        _logger.warning("Interrupted: checkpoints of finished epochs are kept, --resume goes on from the last.")
    finally:
        if log is not None:
            log.close()
    if run.folder is not None and run.saver is not None:
        _finish(plan, run.folder, run.saver, draw_pictures=bool(results))
    tested = None if interrupted else _test(plan, run.folder)
    if utils.is_primary(args):
        _print_results(plan, results, tested)
    if run.folder is not None and not interrupted:
        attack_exported(plan, run.folder)
    if interrupted:
        sys.exit(130)


def _create_saver(plan: Plan, folder: Path) -> TrainCheckpointSaver:
    run = plan.run
    saver = TrainCheckpointSaver(
        model=run.module,
        optimizer=run.optimizer,
        args=run.args,
        amp_scaler=run.precision.scaler,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        decreasing=plan.decreasing,
        max_history=run.args.checkpoint_hist,
        task=run.task,
    )
    saver.label_names = plan.label_names
    if plan.resume_path and Path(plan.resume_path).resolve().parent == folder.resolve():
        saver.load_state_dict_from_checkpoint(plan.resume_path)
    return saver


def _run_epoch(plan: Plan, epoch: int, log: MetricLog | None) -> list[dict[str, Any]]:
    """Train one epoch, then validate, record and save if it is time to; return the result as a list of 0 or 1."""
    run, args = plan.run, plan.run.args
    _set_loader_epoch(run.loader, epoch)
    train_metrics = train_one_epoch(run, epoch)
    check_weights(args, run.module, run.device, epoch)
    if args.distributed and args.dist_bn:
        utils.distribute_bn(run.module, args.world_size, args.dist_bn == "reduce")

    done = epoch + 1
    due = done % args.val_interval == 0 or done == plan.num_epochs
    metric, results = None, []
    if due or done == plan.stop_epoch:
        # an epoch that is validated only because the run stops there must not shift what is drawn after a resume
        with contextlib.nullcontext() if due else torch.random.fork_rng(devices=[]):
            eval_metrics = _validate(plan)
        if log is not None:
            log.write(epoch, train_metrics, eval_metrics, run.learning_rate)
        metric = (eval_metrics or train_metrics)[plan.eval_metric]
        results.append({"epoch": epoch, "train": train_metrics})
        if eval_metrics is not None:
            results[0]["validation"] = eval_metrics
    if results or done in args.save_epochs:
        states = gather_random_states()
        if run.saver is not None:
            run.saver.random_states = states
            run.saver.save_checkpoint(epoch, metric=metric)
            if done in args.save_epochs:
                run.saver.save_milestone(done)
    if run.scheduler is not None:
        run.scheduler.step(done, metric if due else None)
    return results


def _validate(plan: Plan) -> dict[str, float] | None:
    """Validates the model and, where there is one, its average, whose metrics then count."""
    run, args = plan.run, plan.run.args
    if plan.eval_loader is None:
        return None
    metrics = validate(args, run.task, plan.eval_model, plan.eval_loader, device=run.device, precision=run.precision)
    average = run.task.get_eval_model(ema=True)
    if average is not None and not args.model_ema_force_cpu:
        if args.distributed and args.dist_bn:
            utils.distribute_bn(average, args.world_size, args.dist_bn == "reduce")
        metrics = validate(
            args, run.task, average, plan.eval_loader, device=run.device, precision=run.precision, label="Test (EMA)"
        )
    return metrics


def _set_loader_epoch(loader: Any, epoch: int) -> None:
    """Tells dataset and sampler which epoch it is, for their shuffling."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    for sampler in (loader.batch_sampler, loader.sampler):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
            break


def _finish(plan: Plan, folder: Path, saver: TrainCheckpointSaver, *, draw_pictures: bool) -> None:
    """Exports the best checkpoint, draws, and says where everything is."""
    if saver.best_metric is not None:
        _logger.info(f"*** Best metric: {saver.best_metric} (epoch {saver.best_epoch})")
    _export(plan, folder)
    if draw_pictures and isinstance(plan.run.task, ReportingTask) and importlib.util.find_spec("matplotlib"):
        try:
            _logger.info("Pictures: " + ", ".join(path.name for path in draw(folder)))
        except UsageError as error:  # the run itself is complete
            _logger.warning(f"No pictures: {error}")


def _test(plan: Plan, folder: Path | None) -> dict[str, Any] | None:
    """Does what ``--test-split`` asks for, if it does; every rank calls it."""
    if plan.test_loader is None:
        return None
    if plan.stop_epoch < plan.num_epochs:
        _logger.info(f"Not tested: --test-split waits for the last of {plan.num_epochs} epochs.")
        return None
    return test_best_checkpoint(plan.run, plan.eval_model, plan.test_loader, folder)


def _print_results(plan: Plan, results: list[dict[str, Any]], tested: dict[str, Any] | None) -> None:
    """Prints the ten best epochs of this session as timm does, the best last; a test goes with its epoch."""
    ranked = sorted(
        results,
        key=lambda result: result.get("validation", result["train"]).get(plan.eval_metric, 0),
        reverse=plan.decreasing,
    )[-10:]
    if tested is not None:
        chosen = next((result for result in ranked if result["epoch"] == tested["epoch"]), {"epoch": tested["epoch"]})
        ranked = [result for result in ranked if result is not chosen] + [chosen | {"test": tested}]
    print(f"--result\n{json.dumps(ranked, indent=4)}", flush=True)


def _is_exported(folder: Path) -> bool:
    """Whether the best checkpoint's export is complete: all of its files are there, and not of an earlier session."""
    source = best_checkpoint(folder)
    files = [folder / WEIGHTS_FILE, folder / CONFIG_FILE]
    return source is None or all(file.exists() and file.stat().st_mtime >= source.stat().st_mtime for file in files)


def _export(plan: Plan, folder: Path) -> None:
    """Leaves the best checkpoint as a plain timm model beside it."""
    source = best_checkpoint(folder)
    if source is not None:
        model = utils.unwrap_model(plan.run.task.get_eval_model())
        export_checkpoint(source, model, folder, use_ema=plan.run.args.model_ema, data_config=plan.data_config)
        _logger.info(f"Checkpoints, summary.csv, args.yaml and {WEIGHTS_FILE} (of {source.name}) are in {folder}")
