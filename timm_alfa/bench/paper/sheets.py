"""The paper's tables and figures, and the controls, as lists of runs beside the paper's numbers.

Accuracies are top-1 in percent on the test images. Where the paper leaves a setting open, a sheet's note says what is
taken. The controls at the end are not from the paper: they take its objective apart.
"""

from __future__ import annotations

from .runs import Row, Run, Sheet, alfa_at, alfa_with_alpha, changed, method, plain


def _sweep(base: str, papers: dict[str, float]) -> list[Row]:
    return [Row(f"{base}, alpha {alpha}/255", alfa_with_alpha(base, alpha), top1) for alpha, top1 in papers.items()]


def _pairs(dataset: str, papers: dict[str, tuple[float, float]]) -> tuple[Row, ...]:
    rows = []
    for model, (standard, alfa) in papers.items():
        base = f"{dataset}-{model}"
        rows += [Row(f"{base}, plain", plain(base), standard), Row(f"{base}, ALFA", method(base, "alfa"), alfa)]
    return tuple(rows)


def _places(base: str, last: str, places: tuple[str, ...]) -> list[Row]:
    return [Row(f"{base}, {place}", alfa_at(base, *place.split(" + "), last=last)) for place in places]


def _steps(base: str, default: str, papers: dict[str, float]) -> list[Row]:
    runs = {
        steps: method(base, "alfa")
        if steps == default
        else changed(base, "alfa", f"pgd{steps}", f"--alfa-steps {steps}")
        for steps in papers
    }
    return [Row(f"{base}, PGD-{steps}", run, papers[steps]) for steps, run in runs.items()]


def _gammas(papers: dict[str, float | None]) -> list[Row]:
    base = "cifar100-resnet56s"
    runs = {
        gamma: method(base, "lalfa")
        if gamma == "1"
        else changed(base, "lalfa", f"gamma{gamma}", f"--alfa-gamma {gamma}")
        for gamma in papers
    }
    return [Row(f"gamma {gamma}", run, papers[gamma]) for gamma, run in runs.items()]


C20, C56, C18 = "cifar10-resnet20s", "cifar10-resnet56s", "cifar10-resnet18"
H56, I18, I50, IB0 = "cifar100-resnet56s", "imagenet-resnet18", "imagenet-resnet50", "imagenet-efficientnet_b0"

_TABLES = {
    "1": Sheet(
        "Table 1: step sizes at the last block, PGD-5",
        (
            Row(f"{C20}, plain", plain(C20), 91.25),
            *_sweep(C20, {"0.5": 92.52, "1.0": 92.47, "1.5": 92.34, "2.0": 91.36}),
            Row(f"{C56}, plain", plain(C56), 93.03),
            *_sweep(C56, {"0.5": 94.38, "1.0": 94.47, "1.5": 94.72, "2.0": 93.45}),
        ),
    ),
    "2": Sheet(
        "Table 2: CIFAR-10",
        _pairs(
            "cifar10",
            {
                "resnet20s": (91.25, 92.52),
                "resnet56s": (93.03, 94.72),
                "resnet18": (94.30, 94.65),
                "resnet50": (94.73, 95.24),
                "resnet101": (95.17, 95.38),
            },
        ),
    ),
    "3": Sheet(
        "Table 3: CIFAR-100 and ImageNet",
        (
            *_pairs("cifar100", {"resnet20s": (66.92, 67.79), "resnet56s": (71.22, 72.36)}),
            *_pairs(
                "imagenet",
                {
                    "resnet18": (69.38, 70.19),
                    "resnet50": (75.21, 76.23),
                    "resnet101": (77.10, 78.04),
                    "resnet152": (78.31, 78.65),
                },
            ),
        ),
    ),
    "4": Sheet(
        "Table 4: step sizes, ResNet-18, PGD-5",
        (
            Row("plain", plain(C18), 94.30),
            *_sweep(C18, {"0.5": 93.15, "1.0": 94.65, "1.5": 94.34, "2.0": 94.36, "4.0": 93.30}),
        ),
    ),
    "5": Sheet(
        "Table 5: steps of the attack, ResNet-18",
        (
            Row(f"{C18}, plain", plain(C18), 94.30),
            *_steps(C18, "5", {"1": 94.46, "3": 94.43, "5": 94.65, "7": 94.39, "10": 94.17}),
            Row(f"{I18}, plain", plain(I18), 69.38),
            *_steps(I18, "1", {"1": 70.19, "3": 68.65, "5": 67.42}),
        ),
    ),
    "6": Sheet(
        "Table 6: accuracy and time against AdvProp",
        (
            Row(f"{C18}, plain", plain(C18), 94.30),
            Row(f"{C18}, AdvProp PGD-5", method(C18, "advprop"), 94.52),
            Row(f"{C18}, AdvProp PGD-1", changed(C18, "advprop", "pgd1", "--advprop-eps 1 --advprop-steps 1")),
            Row(f"{C18}, ALFA", method(C18, "alfa"), 94.65),
            Row(f"{IB0}, plain", plain(IB0), 77.00),
            Row(f"{IB0}, AdvProp PGD-5", method(IB0, "advprop"), 77.50),
            Row(f"{IB0}, AdvProp PGD-1", changed(IB0, "advprop", "pgd1", "--advprop-eps 1 --advprop-steps 1")),
            Row(f"{IB0}, ALFA", method(IB0, "alfa"), 77.60),
        ),
        "The paper's seconds per epoch, by its text: 23 plain, 123 AdvProp, 28 ALFA (ResNet-18, CIFAR-10, one GTX 1080 "
        "Ti); 2628, 13352, 3140 (EfficientNet-B0, ImageNet, two Quadro RTX 6000). It does not give AdvProp's attack.",
    ),
    "7": Sheet(
        "Table 7: other augmentations of features",
        (
            Row(f"{C56}, plain", plain(C56), 93.03),
            Row(f"{C56}, noise", method(C56, "noise"), 93.17),
            Row(f"{C56}, MoEx", method(C56, "moex"), 92.90),
            Row(f"{C56}, ALFA", method(C56, "alfa"), 94.72),
            Row(f"{C18}, plain", plain(C18), 94.30),
            Row(f"{C18}, noise", method(C18, "noise"), 94.34),
            Row(f"{C18}, MoEx", method(C18, "moex"), 94.16),
            Row(f"{C18}, ALFA", method(C18, "alfa"), 94.65),
            Row(f"{C18}, AdvProp", method(C18, "advprop"), 94.52),
        ),
        "The paper's standard deviations over 5 runs: ResNet-56s 0.09 (noise), 0.33 (MoEx), 0.06 (ALFA); ResNet-18 "
        "0.10, 0.23, 0.08 and 0.28 (AdvProp).",
    ),
    "8": Sheet(
        "Table 8: L-ALFA at nine blocks",
        (
            Row(f"{C18}, plain", plain(C18), 94.30),
            Row(f"{C18}, L-ALFA", method(C18, "lalfa"), 94.62),
            Row(f"{C18}, ALFA", method(C18, "alfa"), 94.65),
            Row(f"{H56}, plain", plain(H56), 71.22),
            Row(f"{H56}, L-ALFA", method(H56, "lalfa"), 72.40),
            Row(f"{H56}, ALFA", method(H56, "alfa"), 72.36),
            Row(f"{I50}, plain", plain(I50), 75.21),
            Row(f"{I50}, L-ALFA", method(I50, "lalfa"), 76.12),
            Row(f"{I50}, ALFA", method(I50, "alfa"), 76.23),
        ),
        "The paper does not give L-ALFA's steps, alpha and gamma here; the recipes say where theirs are from.",
    ),
    "9": Sheet(
        "Table 9: number of perturbed blocks, L-ALFA, ResNet-18",
        (
            Row("plain", plain(C18), 94.30),
            Row("4 blocks", changed(C18, "lalfa", "paper4", "--alfa-blocks @paper4"), 94.52),
            Row("9 blocks", method(C18, "lalfa"), 94.62),
            Row("20 blocks", changed(C18, "lalfa", "paper20", "--alfa-blocks @paper20"), 93.54),
        ),
    ),
    "10": Sheet(
        "Table 10: gamma, L-ALFA, CIFAR-100, ResNet-56s",
        (
            Row("plain", plain(H56), 71.22),
            *_gammas({"0": None, "0.1": None, "0.2": None, "0.5": 72.35, "1": 72.40, "2": 72.38, "10": 71.92}),
        ),
        "The table has seven values of gamma over six accuracies; 70.68 and 72.13 belong to two of the first three.",
    ),
}
_FIGURES = {
    "2": Sheet(
        "Figure 2: blocks of ResNet-20s",
        (
            Row("plain", plain(C20), 91.25),
            *_places(
                C20,
                "layer3",
                (
                    "layer1",
                    "layer2",
                    "layer3",
                    "layer1 + layer2",
                    "layer1 + layer3",
                    "layer2 + layer3",
                    "layer1 + layer2 + layer3",
                ),
            ),
        ),
        "A figure without numbers; steps and alpha are those of Table 2.",
    ),
    "3": Sheet(
        "Figure 3: blocks of ResNet-18 and ResNet-56s",
        (
            Row(f"{C18}, plain", plain(C18), 94.30),
            *_places(
                C18,
                "layer4",
                (
                    "layer1",
                    "layer2",
                    "layer3",
                    "layer4",
                    "layer3 + layer4",
                    "layer2 + layer3 + layer4",
                    "layer1 + layer2 + layer3 + layer4",
                ),
            ),
            Row(f"{C56}, plain", plain(C56), 93.03),
            *_places(C56, "layer3", ("layer1", "layer2", "layer3", "layer2 + layer3", "layer1 + layer2 + layer3")),
        ),
        "A figure without numbers. The paper tunes alpha for each bar among 0.5, 1.0 and 1.5/255; here it is that of "
        "Table 2.",
    ),
    "4": Sheet(
        "Figure 4: eta over training",
        (Row(f"{I50}, L-ALFA", method(I50, "lalfa")), Row(f"{C18}, L-ALFA", method(C18, "lalfa"))),
        "The pictures of eta are `eta.png` in the runs' folders.",
    ),
}


def _control(suffix: str, flags: str) -> Run:
    return changed(C20, "alfa", suffix, flags)


def _plain_control(suffix: str, flags: str) -> Run:
    return Run(f"{C20}-{suffix}", C20, tuple(flags.split()), plain=C20)


_HALF = "--alfa-grad tail --alfa-reduction mean"
CONTROLS = Sheet(
    "Controls: what the objective consists of, ResNet-20s on CIFAR-10",
    (
        Row("plain", plain(C20)),
        Row("ALFA (full gradients, sum)", method(C20, "alfa")),
        Row("tail gradients", _control("tail", "--alfa-grad tail")),
        Row("mean", _control("mean", "--alfa-reduction mean")),
        Row("tail gradients, mean", _control("tail-mean", _HALF)),
        Row("all passes move running statistics", _control("bn-shared", "--alfa-bn shared")),
        Row("tail, mean, shared statistics", _control("released", f"{_HALF} --alfa-bn shared")),
        Row(
            "as released: the same at the output of layer1",
            _control("released-layer1", f"{_HALF} --alfa-bn shared --alfa-blocks layer1"),
        ),
        Row("delta = 0, sum: the clean loss twice", _control("delta0", "--alfa-eps 0 --alfa-steps 1")),
        Row(
            "delta = 0, tail, mean: half the gradient before the block",
            _control("delta0-tail-mean", f"{_HALF} --alfa-eps 0 --alfa-steps 1"),
        ),
        Row(
            "plain, twice the learning rate, half the decay (equals the clean loss twice)",
            _plain_control("lr2-wd0.5", "--lr 0.2 --warmup-lr 0.001 --weight-decay 2.5e-4"),
        ),
        Row("plain, twice the learning rate", _plain_control("lr2", "--lr 0.2 --warmup-lr 0.001")),
        Row("plain, half the decay", _plain_control("wd0.5", "--weight-decay 2.5e-4")),
        Row("plain, twice the decay", _plain_control("wd2", "--weight-decay 1e-3")),
        Row("noise of the step's size", _plain_control("noise", "--method noise --noise-sigma 0.5/255")),
        *(
            Row(f"at {' + '.join(blocks)}", alfa_at(C20, *blocks, last="layer3"))
            for blocks in (("layer1",), ("layer2",), ("layer2", "layer3"), ("layer1", "layer2", "layer3"))
        ),
        *(Row(f"alpha {alpha}/255", alfa_with_alpha(C20, alpha)) for alpha in ("0.1", "1.5", "5", "15", "50")),
        *(
            Row(
                f"{share} % of the feature at {block}, one step, mean",
                _control(
                    f"{share}percent-{block}",
                    f"--alfa-blocks {block} --alfa-alpha {share}% --alfa-steps 1 --alfa-reduction mean",
                ),
            )
            for block, share in (
                ("layer1", 2),
                ("layer2", 2),
                ("layer3", 2),
                ("layer1", 5),
                ("layer2", 5),
                ("layer3", 5),
            )
        ),
    ),
    "In SGD with weight decay w and rate r, a loss counted twice is the rate 2r with the decay w/2. With an `eps` of 0 "
    "the perturbation is 0 and all else stays as it is.",
)

SHEETS: dict[str, Sheet] = {
    **{f"table {number}": sheet for number, sheet in _TABLES.items()},
    **{f"figure {number}": sheet for number, sheet in _FIGURES.items()},
    "controls": CONTROLS,
}

RUNS: dict[str, Run] = {row.run.name: row.run for sheet in SHEETS.values() for row in sheet.rows}
"""Every run by its name."""
