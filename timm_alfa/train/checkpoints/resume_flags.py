"""What becomes of a flag that is changed when a run is resumed: every flag has one of four fates.

A run is built from the flags of its command and then gets what a checkpoint holds: weights, the state of the optimizer,
random states, the ranking of its checkpoints. A flag whose matter is in there cannot simply be changed.
"""

from __future__ import annotations

import argparse
import enum
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ...blocks.resolve import resolve_blocks
from ...errors import UsageError
from ...run_folder.output import DEFAULT_OUTPUT
from ...tasks.flags import flag_name, flag_text
from ..log import is_first_process

__all__ = ["FATES", "Fate", "check_same_blocks", "settle_flags"]

_logger = logging.getLogger(__name__)


class Fate(enum.Enum):
    """What becomes of a flag whose value differs from that of the run that wrote the checkpoint."""

    EFFECTIVE = "the new value holds from here on"
    KEPT = "the old value goes on, with a warning"
    REFUSED = "the run does not start"
    RANKING = "refused where the ranking of checkpoints goes on, which compares like with like; else effective"


# What a flag is about, where that alone decides. Every flag of the parser is in exactly one of these lines.
_NAMES: dict[Fate, str] = {
    Fate.EFFECTIVE: """
        alfa_list_blocks alfa_dry_run alfa_alpha alfa_steps alfa_eps alfa_norm alfa_init alfa_lambda alfa_reduction
        alfa_grad alfa_gamma alfa_eta_lr alfa_sample_blocks alfa_space alfa_objective alfa_joint
        advprop_eps advprop_alpha advprop_steps advprop_init advprop_targeted advprop_attack_bn advprop_reduction
        fast_advprop_share fast_advprop_eps fast_advprop_alpha
        noise_sigma noise_lambda noise_reduction noise_objective noise_grad
        moex_lambda moex_prob pgd_at_eps pgd_at_alpha pgd_at_steps pgd_at_init
        data data_dir dataset train_split train_fraction test_split train_num_samples val_num_samples dataset_download
        unlabeled_dir class_map input_img_mode input_key target_key target_format dataset_trust_remote_code
        distill_loss_weight task_loss_weight kd_temperature kd_token_distill_type
        resume no_resume_opt img_size input_size crop_pct mean std interpolation batch_size validation_batch_size
        channels_last grad_accum_steps grad_checkpointing fast_norm torchcompile torchcompile_mode cuda_graph
        device amp amp_dtype model_dtype no_ddp_bb synchronize_step local_rank device_modules
        opt_eps opt_betas clip_grad clip_mode layer_decay_min_scale
        sched sched_on_updates lr lr_base lr_base_size lr_base_scale lr_noise lr_noise_pct lr_noise_std lr_cycle_mul
        lr_cycle_decay lr_cycle_limit lr_k_decay warmup_lr min_lr epochs stop_epoch epoch_repeats start_epoch
        decay_milestones decay_epochs warmup_epochs warmup_updates warmup_prefix cooldown_epochs patience_epochs
        decay_rate
        no_aug train_crop_mode crop_padding scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob
        gaussian_blur_prob aa aug_repeats bce_loss bce_sum bce_target_thresh bce_pos_weight reprob remode recount mixup
        cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch smoothing train_interpolation drop
        drop_connect drop_path drop_block
        bn_momentum bn_eps sync_bn dist_bn model_ema_decay model_ema_warmup
        worker_seeding log_interval val_interval recovery_interval checkpoint_hist save_epochs workers cache_images
        save_images pin_mem no_prefetcher output experiment tta use_multi_epochs_loader log_tensorboard log_wandb
        wandb_project wandb_tags wandb_resume_id
        eval_pgd eval_pgd_eps eval_pgd_alpha eval_pgd_init
        train_img_sizes train_batch_sizes train_size_probs train_size_schedule train_size_schedule_spread
        train_size_random_mix train_batches_per_epoch variable_batch_loss_scale
    """,
    # the checkpoint's weights and random states are what the run goes on from
    Fate.KEPT: "pretrained pretrained_path initial_checkpoint head_init_scale head_init_bias seed",
    # another model, another method, other images held out; and what timm's script has and this one refuses anyway
    Fate.REFUSED: """
        model num_classes in_chans gp model_kwargs
        method alfa_blocks alfa_learnable alfa_eta_set noise_blocks moex_block
        val_fraction split_seed
        torchscript fuser aug_splits jsd_loss resplit split_bn naflex_loader naflex_train_seq_lens naflex_max_seq_len
        naflex_patch_sizes naflex_patch_size_probs naflex_loss_scale naflex_patchify_channels_first
        task kd_distill_type kd_loss_type kd_student_feature_dim kd_teacher_feature_dim
    """,
    Fate.RANKING: "eval_metric val_split model_ema model_ema_force_cpu",
}


def _unless_new(args: argparse.Namespace, refused: bool) -> Fate:
    """For what the optimizer's state depends on: ``--no-resume-opt`` makes a new optimizer."""
    return Fate.REFUSED if refused and not args.no_resume_opt else Fate.EFFECTIVE


def _of_batch_norm(old: Any, new: Any, args: argparse.Namespace) -> Fate:
    return Fate.REFUSED if "aux" in (old, new) else Fate.EFFECTIVE  # which are parameters of their own


def _of_teacher(old: Any, new: Any, args: argparse.Namespace) -> Fate:
    return Fate.EFFECTIVE if old and new else Fate.REFUSED  # its folder may have moved


def _of_threshold(old: Any, new: Any, args: argparse.Namespace) -> Fate:
    return Fate.RANKING if str(args.eval_metric).endswith("_f1") else Fate.EFFECTIVE


# Where the values decide: (old, new, all new flags) -> fate.
_BY_VALUE: dict[str, Callable[[Any, Any, argparse.Namespace], Fate]] = {
    "kd_model_name": _of_teacher,
    "multilabel_threshold": _of_threshold,
    "alfa_bn": _of_batch_norm,
    "noise_bn": _of_batch_norm,
    "opt": lambda old, new, args: _unless_new(args, str(old).lower() != str(new).lower()),
    "opt_kwargs": lambda old, new, args: _unless_new(args, True),
    # many an optimizer keeps what momentum needs from its first step on, or never
    "momentum": lambda old, new, args: _unless_new(args, not (old and new)),
    # these make other groups of parameters: without decay timm makes one group of them all
    "weight_decay": lambda old, new, args: _unless_new(args, args.layer_decay is None and not (old and new)),
    "layer_decay": lambda old, new, args: _unless_new(args, old is None or new is None),
    "layer_decay_no_opt_scale": lambda old, new, args: _unless_new(args, True),
}

FATES: dict[str, Fate | Callable[[Any, Any, argparse.Namespace], Fate]] = {
    **{name: fate for fate, names in _NAMES.items() for name in names.split()},
    **_BY_VALUE,
}

_OF_OPTIMIZER = ("opt", "opt_kwargs", "momentum", "weight_decay", "layer_decay", "layer_decay_no_opt_scale")
# set by a run itself, in the place of what stands for "left out"
_RESOLVED: dict[str, tuple[Any, ...]] = {
    "lr": (None, 0), "lr_base_scale": ("",), "num_classes": (None,), "in_chans": (None,), "device": ("cuda",),
    "dist_bn": ("reduce",), "eval_metric": (None,), "smoothing": (None,),
}  # fmt: skip
# of one session, so nothing to report
_SESSION = {"resume", "no_resume_opt", "output", "experiment", "stop_epoch", "start_epoch", "alfa_list_blocks",
            "alfa_dry_run", "local_rank", "wandb_resume_id", "data"}  # fmt: skip
# names that mean modules: compared by what they mean, once there is a model
_BLOCKS = ("alfa_blocks", "noise_blocks")


def settle_flags(args: argparse.Namespace, path: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Compare the flags with those that the checkpoint's run had, and give each that differs its fate.

    Args:
        args: The new flags; those that are kept get their old values.
        path: The checkpoint's.
        checkpoint: Its contents; ``args`` in it are the old flags, of this command or of timm's.

    Returns:
        The flags that are kept, for the record.

    Raises:
        UsageError: A flag differs that cannot be changed.
    """
    old = previous_flags(checkpoint)
    if not old:
        if is_first_process():
            _logger.warning(f"--resume {path}: does not say with which flags it was trained; they are not compared.")
        return {}
    kept: dict[str, Any] = {}
    notes, effective = [], []
    for name, before, now in _changes(args, old):
        fate = _fate(name, before, now, args, path, checkpoint)
        if fate is Fate.REFUSED and name not in _BLOCKS:
            raise UsageError(_refusal(args, path, name, before, now))
        if fate is Fate.KEPT:
            right = isinstance(before, int) and 0 <= before < 2**32 if name == "seed" else True
            if not (right and isinstance(before, (str, int, float, type(None)))):
                raise UsageError(f"--resume {path}: damaged ('args': no run has such a {flag_name(name)})")
            notes.append(
                f"{_said(name, now)} has no effect, the run goes on with {_said(name, before)}: what it "
                "decides is in the checkpoint"
            )
            kept[name] = before
        elif fate is Fate.EFFECTIVE and name not in _SESSION:
            effective.append(f"{_said(name, now)} (it was {_said(name, before)})")
    if is_first_process():
        for note in notes:
            _logger.warning(f"--resume {path}: {note}.")
        if effective:
            _logger.info(f"--resume {path}: from here on {', '.join(effective)}.")
    vars(args).update(kept)
    return kept


def check_same_blocks(args: argparse.Namespace, path: str, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Raise ``UsageError`` if the run perturbed other blocks than the flags now name; aliases are the same blocks.

    Their order matters to eta alone, which looks itself.
    """
    old = previous_flags(checkpoint)
    for name in _BLOCKS:
        before, now = old.get(name), getattr(args, name)
        if before is None or now is None or before == now:
            continue
        try:
            same = sorted(resolve_blocks(model, before)) == sorted(resolve_blocks(model, now))
        except (ValueError, TypeError, AttributeError):
            same = False
        if not same:
            raise UsageError(_refusal(args, path, name, before, now))


def previous_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint; empty if it does not tell."""
    old = checkpoint.get("args")
    return vars(old) if isinstance(old, argparse.Namespace) else {}


def _changes(args: argparse.Namespace, old: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Flags that differ: name, old value, new value."""
    old = {"method": "standard", **old}  # timm's runs do not say
    found = []
    for name in FATES:
        if name not in old or not hasattr(args, name):
            continue
        before, now = old[name], getattr(args, name)
        left_out = _RESOLVED.get(name, ())
        try:
            same = bool(before == now or before in left_out or now in left_out)
        except Exception:  # whatever a damaged file holds
            same = False
        if not same:
            found.append((name, before, now))
    return found


def _fate(name: str, before: Any, now: Any, args: argparse.Namespace, path: str, checkpoint: dict[str, Any]) -> Fate:
    rule = FATES[name]
    fate = rule if isinstance(rule, Fate) else rule(before, now, args)
    if fate is Fate.RANKING:
        return Fate.REFUSED if _goes_on_in_place(args, path) else Fate.EFFECTIVE
    if name == "seed" and checkpoint.get("random_states") is None:
        return Fate.EFFECTIVE
    return fate


def _goes_on_in_place(args: argparse.Namespace, path: str) -> bool:
    if args.resume == "auto":
        return True
    folder = Path(args.output or DEFAULT_OUTPUT, args.experiment)
    return bool(args.experiment) and folder.resolve() == Path(path).resolve().parent


def _refusal(args: argparse.Namespace, path: str, name: str, before: Any, now: Any) -> str:
    if name in _OF_OPTIMIZER:
        remedy = "--no-resume-opt goes on with a new optimizer"
    elif FATES[name] is Fate.RANKING or name == "multilabel_threshold":
        remedy = (
            "checkpoints could not be ranked with the earlier ones; "
            f"--resume {path} with another --experiment ranks its own"
        )
    else:
        remedy = f"--initial-checkpoint {path} starts a new run from its weights"
    return f"--resume {path}: {_said(name, now)}, but the run was started with {_said(name, before)}; {remedy}"


def _said(name: str, value: Any) -> str:
    """A flag with its value, or that it was left out."""
    if value is None or value is False or (isinstance(value, (str, list, dict)) and not value):
        return f"no {flag_name(name)}"
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return flag_text(name, value)
