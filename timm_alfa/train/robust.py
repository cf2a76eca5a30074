"""``--eval-pgd``: the robust accuracy of what a run exported, once it has ended."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import safetensors.torch
from timm import utils

from ..export import WEIGHTS_FILE
from ..robust.evaluation import create_attack, describe, evaluate
from ..run_folder.output import read_record
from ..utils.files import write_file
from .build import Plan

_logger = logging.getLogger(__name__)

ROBUST_FILE = "robust.json"


def is_attacked(plan: Plan, folder: Path) -> bool:
    """Whether ``robust.json`` is there and of the attack that the flags ask for, or they ask for none."""
    args = plan.run.args
    if args.eval_pgd is None:
        return True
    return read_record(folder / ROBUST_FILE).get("attack") == create_attack(args, plan.data_config).describe()


def attack_exported(plan: Plan, folder: Path) -> None:
    """Attacks the exported model on the test or else the validation images, if ``--eval-pgd`` asks for it.

    Leaves ``robust.json``. The primary process does it alone; the run is over, and its model gets the exported weights.
    """
    run, args = plan.run, plan.run.args
    if args.eval_pgd is None or not (folder / WEIGHTS_FILE).exists():
        return
    if plan.stop_epoch < plan.num_epochs:
        _logger.info(f"Not attacked: --eval-pgd waits for the last of {plan.num_epochs} epochs.")
        return
    loader = plan.eval_loader if plan.test_loader is None else plan.test_loader
    model = utils.unwrap_model(run.task.get_eval_model())
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    result = evaluate(
        args,
        model,
        loader.dataset,
        plan.data_config,
        device=run.device,
        dtype=run.precision.model_dtype,
        autocast=run.precision.autocast,
    )
    text = json.dumps({"checkpoint": WEIGHTS_FILE, **result}, indent=1) + "\n"
    write_file(folder / ROBUST_FILE, lambda file: file.write(text.encode()))
    _logger.info(f"Robust accuracy of {WEIGHTS_FILE}: {describe(result)}")
