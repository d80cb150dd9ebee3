"""metrics.json of an evaluation as a person reads it."""

import math
from collections.abc import Mapping
from typing import Any

import rich.box
import rich.console
import rich.table

MEASURES = (
    ("retrieval", "recall@1", "Recall@1", "the nearest other sample is of the same class"),
    ("", "recall@8", "Recall@8", "one of the nearest 8 is"),
    ("", "r_precision", "R-precision", "share of the class among the nearest R = class size - 1"),
    ("", "map@r", "mAP@R", "the same, with order"),
    ("", "map@1000", "mAP@1000", ""),
    ("one threshold", "opis", "OPIS", "variance of utility over classes at one threshold; 0 is consistent"),
    ("", "opis_noise_floor", "noise floor", "at least this OPIS comes from the number of pairs alone"),
    ("", "sqrt_opis", "sqrt(OPIS)", "class utilities differ by about this much"),
    ("", "epsilon_opis", "epsilon-OPIS", "squared gap between the worst and the best tenth of the classes"),
    ("", "mean_utility", "mean utility", "of sensitivity and specificity over the calibration range"),
    ("", "auc", "AUC", "a positive pair is nearer than a negative pair"),
    ("", "equal_error_rate", "equal error rate", "FAR = FRR at some threshold"),
    ("clustering", "nmi", "NMI", "k-means with as many clusters as classes"),
    ("", "ami", "AMI", "the same, less what chance gives"),
    ("", "f1", "pairwise F1", ""),
    ("space", "pi_intra", "pi_intra", "mean cosine distance inside classes"),
    ("", "pi_inter", "pi_inter", "mean cosine distance between class means"),
    ("", "pi_ratio", "pi_ratio", "intra / inter"),
    ("", "spectral_decay", "spectral decay", "rho, nats; 0 uses all dimensions alike"),
    *(
        (group if shots == 1 else "", f"{method}_{shots}shot", f"{name}, {shots}-shot", "")
        for method, name, group in (
            ("knn", "k-NN", "classifies"),
            ("svm", "linear SVM", ""),
            ("gnb", "naive Bayes", ""),
        )
        for shots in (1, 5)
    ),
)
"""Group, name, label and meaning of what is shown; metrics.json holds the rest."""


def print_report(found: Mapping[str, Any]) -> None:
    """Prints the measures, then what thresholds do, from the content of metrics.json."""
    console = rich.console.Console()
    # Whole figures, if need be on broken lines: a cut one says nothing.
    console = rich.console.Console(width=max(console.width, 118))
    console.print(f"\n{found['title']}: {_size(found)}\n", style="bold", highlight=False, markup=False)
    console.print(_measures(found["metrics"], found["prefix"]))
    thresholds = _thresholds(found)
    if thresholds.row_count:
        console.print(thresholds)
    shown = [each for each in found["transfer"] or found["operating_points"] if each.get("worst_far")]
    for each in sorted(shown, key=lambda each: abs(math.log(each["far_target"] / 0.01)))[:1]:
        console.print(f"Classes of the worst FAR at threshold {each['threshold']:.4f}:", highlight=False)
        for row in each["worst_far"]:
            console.print(f"  {_rate(row['far']):<8} {row['name']}", highlight=False, markup=False)


def _size(found: Mapping[str, Any]) -> str:
    counts = {name: found[name] for name in ("samples", "classes", "gallery", "pairs") if found.get(name)}
    counts |= {"of the same": found["same"]} if "same" in found else {}
    return ", ".join(f"{count:,} {'gallery items' if name == 'gallery' else name}" for name, count in counts.items())


def _measures(metrics: Mapping[str, float | None], prefix: str) -> rich.table.Table:
    table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for style in ("bold", "", "", "dim", "dim"):
        table.add_column(style=style, justify="left")
    table.columns[2].justify = "right"
    heading = ""
    for group, name, label, meaning in MEASURES:
        heading = group or heading
        value = metrics.get(prefix + name)
        if prefix + name not in metrics:
            continue
        low, high = (metrics.get(f"{prefix}{name}_{end}") for end in ("low", "high"))
        note = f"95 %: {low:.3f} to {high:.3f}" if low is not None and high is not None else meaning
        table.add_row(heading, label, _figure(name, value), note)
        heading = ""
    return table


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.5f}" if "opis" in name and "sqrt" not in name else f"{value:.4f}"


def _thresholds(found: Mapping[str, Any]) -> rich.table.Table:
    table = rich.table.Table(
        title=f"\nThresholds ({found['distance']} distance; pairs at it or nearer are the same) and what they do here",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("set on")
    for name in ("FAR target", "threshold", "FAR here", "95 %", "FRR here", "95 %", "class FAR, 5-95 %"):
        table.add_column(name, justify="right")
    for kind, where in (("transfer", found["calibrated_on"]), ("operating_points", "these")):
        for row in found[kind]:
            table.add_row(
                where,
                f"{row['far_target']:g}",
                f"{row['threshold']:.4f}",
                _rate(row["far"]),
                _interval(row.get("far_interval")),
                _rate(row["frr"]),
                _interval(row.get("frr_interval")),
                _quantiles(row.get("far_quantiles")),
            )
    return table


def _rate(value: float) -> str:
    return f"{value:.3g}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2g} to {ends[1]:.2g}"


def _quantiles(by_share: Mapping[str, float] | None) -> str:
    if not by_share:
        return ""
    values = list(by_share.values())
    return f"{values[0]:.2g} to {values[-1]:.2g}"
