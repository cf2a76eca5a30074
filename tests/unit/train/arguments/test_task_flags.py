"""--task, --target-format and timm's distillation flags: defaults, combinations, and what is told of them."""

from __future__ import annotations

import logging

import pytest
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from timm_alfa import UsageError
from timm_alfa.train.arguments.command_line import build_parser, parse_args

LABELS = "--task multilabel --num-classes 3 "
TAUGHT = "--kd-model-name resnet18 "


@pytest.mark.parametrize(
    ("argv", "metric", "smoothing"),
    [
        ("", "top1", 0.1),
        (LABELS, "map", 0.0),
        (LABELS + "--eval-metric micro_f1 --smoothing 0.2", "micro_f1", 0.2),
        ("--eval-metric loss --smoothing 0", "loss", 0.0),
    ],
)
def test_what_is_left_out_follows_from_the_task(argv: str, metric: str, smoothing: float):
    args = parse_args(argv.split())
    assert (args.eval_metric, args.smoothing) == (metric, smoothing)


def test_every_metric_of_timms_evaluators_can_be_asked_for():
    for start, evaluator in (("", ClassificationEvaluator), (LABELS, MultiLabelClassificationEvaluator)):
        for name in evaluator.metric_names:
            assert parse_args([*start.split(), "--eval-metric", name]).eval_metric == name


def test_timms_names_and_defaults():
    actions = {action.dest: action for action in build_parser()._actions}
    defaults = {
        "task": "classification", "target_format": None, "multilabel_threshold": 0.5, "kd_model_name": None,
        "kd_distill_type": "logit", "kd_loss_type": "kl", "distill_loss_weight": None, "task_loss_weight": None,
        "kd_temperature": 4.0, "kd_student_feature_dim": None, "kd_teacher_feature_dim": None,
        "kd_token_distill_type": "soft",
    }  # fmt: skip
    assert {name: actions[name].default for name in defaults} == defaults
    assert list(actions["task"].choices or ()) == ["classification", "multilabel"]
    assert list(actions["target_format"].choices or ()) == ["indices", "multihot"]


MISTAKES = {
    "--task segmentation": "invalid choice: 'segmentation'",
    "--task multilabel": "--task multilabel: needs --num-classes",
    LABELS + "--multilabel-threshold 1": "--multilabel-threshold 1.0: must be between 0 and 1",
    LABELS + "--eval-metric top1": "--eval-metric top1: must be one of map, micro_f1, macro_f1, sample_f1, loss",
    "--eval-metric map": "--eval-metric map: must be one of top1, top5, loss",
    LABELS + TAUGHT: "--kd-model-name resnet18: does not go with --task multilabel",
    LABELS + "--eval-pgd 3": "--eval-pgd 3: does not go with --task multilabel",
    LABELS + "--alfa-blocks @last --alfa-objective kl --alfa-init uniform --alfa-eps 2% --unlabeled-dir .":
        "--unlabeled-dir .: does not go with --task multilabel",
    LABELS + "--method advprop --advprop-targeted": "--advprop-targeted: draws another class",
    LABELS + "--target-key a,b": "--num-classes 3: --target-key names 2 labels, expected 2",
    LABELS + "--target-key a,b,": "--target-key a,b,: expected names, each once and none empty",
    LABELS + "--target-key a,b,c --target-format multihot": "--target-format multihot: is for one field",
    "--target-format multihot": "--target-format multihot: needs --task multilabel",
    "--target-key a,b": "--target-key a,b: names several fields; these need --task multilabel",
    "--kd-model-name=": "--kd-model-name: is empty",
    TAUGHT + "--kd-loss-type mse": "invalid choice: 'mse'",
    TAUGHT + "--task-loss-weight 1.5": "--task-loss-weight 1.5: by itself gives the teacher the weight 1 - 1.5",
    TAUGHT + "--distill-loss-weight -1": "--distill-loss-weight -1.0: must be a finite weight of at least 0",
    TAUGHT + "--kd-temperature 0": "--kd-temperature 0.0: must be above 0",
    TAUGHT + "--kd-distill-type feature --kd-teacher-feature-dim 0": "--kd-teacher-feature-dim 0: must be at least 1",
    TAUGHT + "--method advprop": "--kd-model-name resnet18: does not go with --method advprop; expected standard, alfa",
    TAUGHT + "--method moex --moex-block maxpool": "--kd-model-name resnet18: does not go with --method moex",
    TAUGHT + "--alfa-blocks @last --moex-block maxpool": "--moex-block maxpool: does not go with --kd-model-name",
    TAUGHT + "--alfa-blocks @last --alfa-objective kl --kd-distill-type token":
        "--alfa-objective kl: compares logits alone; expected ce with --kd-distill-type token",
    TAUGHT + "--method noise --noise-objective kl --kd-distill-type feature": "--noise-objective kl: compares logits",
    TAUGHT + "--alfa-blocks @last --alfa-objective kl --alfa-init uniform --alfa-eps 2% --unlabeled-dir .":
        "--unlabeled-dir .: does not go with --kd-model-name resnet18",
}  # fmt: skip


@pytest.mark.parametrize("argv", MISTAKES)
def test_a_combination_that_cannot_work_is_one_line(argv: str):
    with pytest.raises(UsageError) as caught:
        parse_args(argv.split())
    assert MISTAKES[argv] in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = [
    TAUGHT + "--task-loss-weight 0.3",
    TAUGHT + "--task-loss-weight 1.5 --distill-loss-weight 2",
    TAUGHT + "--method noise --kd-distill-type token --kd-token-distill-type hard",
    TAUGHT + "--alfa-blocks @last --alfa-objective kl",
    TAUGHT + "--alfa-blocks @last --alfa-learnable --kd-distill-type feature",
    LABELS + "--alfa-blocks @last --alfa-objective kl",
    LABELS + "--method advprop",
    LABELS + "--target-key a,b,c",
    LABELS + "--target-key labels --target-format multihot",
]


@pytest.mark.parametrize("argv", GOOD)
def test_a_combination_that_works_is_quiet(argv: str, caplog: pytest.LogCaptureFixture):
    parse_args(argv.split())
    assert not caplog.records


UNUSED = {
    "--multilabel-threshold 0.4": "--multilabel-threshold 0.4: has no effect without --task multilabel",
    "--target-format indices": "--target-format indices: has no effect without --task multilabel",
    "--kd-temperature 2": "--kd-temperature 2.0: has no effect without --kd-model-name",
    "--distill-loss-weight 2": "--distill-loss-weight 2.0: has no effect without --kd-model-name",
    TAUGHT + "--kd-distill-type feature --kd-temperature 2": "has no effect with --kd-distill-type feature",
    TAUGHT + "--kd-token-distill-type hard": "--kd-token-distill-type hard: has no effect with --kd-distill-type logit",
    TAUGHT + "--mean 0.5": "the teacher's images are converted from the mean and std that the model came with",
    LABELS + "--bce-loss": "--bce-loss: has no effect with --task multilabel",
}


@pytest.mark.parametrize("argv", UNUSED)
def test_what_changes_nothing_is_told(argv: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        parse_args(argv.split())
    assert UNUSED[argv] in caplog.text
