"""A model card: what a registered model is, what it was trained on, how good it is and where that ends; Markdown."""

from collections.abc import Iterable, Sequence

from dml.checkpoint import Checkpoint
from dml.evaluate import FAR_TARGETS
from tune.tested import Tested

FIGURES = (
    ("Recall@1", "recall@1", 4),
    ("OPIS", "opis", 5),
    ("OPIS noise floor", "opis_noise_floor", 5),
    ("sqrt(OPIS)", "sqrt_opis", 4),
    ("epsilon-OPIS", "epsilon_opis", 5),
    ("mean utility", "mean_utility", 4),
)
LONGEST = 60
"""Characters of a class's name that are shown."""


def model_card(name: str, model: Checkpoint, tested: Tested, baseline: Tested | None = None) -> str:
    """Writes the card, at most 5,000 characters, which is what MLflow's databases hold of a description.

    Args:
        name: of the registered model.
        model: what is registered.
        tested: the model on its test classes.
        baseline: the model without TCM that it was tested beside.
    """
    parts = [
        [f"# {name}", *_what(model)],
        ["## Trained on", *_trained_on(model, tested)],
        ["## How good", *_figures(tested, baseline)],
        ["## Thresholds", *_thresholds(tested)],
        ["## Classes that fare worst", *_worst(model, tested)],
        ["## Limits", *_limits(model, tested)],
    ]
    return "\n\n".join("\n".join(lines).strip() for lines in parts) + "\n"


def _what(model: Checkpoint) -> Iterable[str]:
    data, encoder, tcm = model.config.data, model.config.encoder, model.config.tcm
    size = f"{data.image_size} x {data.image_size}"
    yield (
        f"Image embeddings: {encoder.name} maps {size} px with {data.channels} channel{'s' * (data.channels > 1)} to "
        f"unit vectors of {encoder.dim} dimensions. Two images are of one class where their distance is at most one "
        "threshold, the same for every class."
    )
    margins = f"TCM of weight {tcm.weight:g} with margins {tcm.margin_pos:g} / {tcm.margin_neg:g}"
    yield f"Loss: {model.config.loss.name}{f', {margins}' if tcm.weight else ', no TCM'}."
    if model.info.get("init"):
        yield f"Its weights started from {_plain(_place(str(model.info['init'])))}."
    elif encoder.pretrained or encoder.weights:
        yield f"The backbone started from {'published weights' if encoder.pretrained else 'weights of its own'}."


def _trained_on(model: Checkpoint, tested: Tested) -> Iterable[str]:
    data, train = model.config.data, model.config.train
    yield f"{data.dataset}, split by class (split seed {data.split_seed}), fingerprint `{tested.fingerprint[:16]}`:"
    yield from _table(
        ("split", "classes", "images"),
        [(split, f"{classes:,}", f"{images:,}") for split, (classes, images) in (tested.sizes or {}).items()],
    )
    epoch = model.info.get("epoch")
    which = f", the weights are those of epoch {epoch}, the best on val" if epoch else ""
    yield f"Epochs {train.epochs}, seed {train.seed}{which}."
    if data.train_on_val:
        yield f"After its settings were chosen on val, {data.train_on_val:.0%} of the val classes joined train."


def _figures(tested: Tested, baseline: Tested | None) -> Iterable[str]:
    yield f"On {tested.classes:,} test classes, which no choice has seen:"
    rows = []
    for label, name, digits in FIGURES:
        sides = [tested] if baseline is None else [tested, baseline]
        rows.append((label, *(f"{side.metrics[f'test/{name}']:.{digits}f}" for side in sides)))
    yield from _table(("", "this model", *(["without TCM"] if baseline is not None else [])), rows)


def _thresholds(tested: Tested) -> Iterable[str]:
    if not tested.operating_points:
        yield "None: the val classes resolve no false accept rate that is asked for."
        return
    unit = "Euclidean" if tested.operating_points[0]["distance"] == "euclidean" else "cosine"
    yield f"{unit} distances, set on val classes, which nothing was trained on, and what they do on test classes:"
    rows = [
        (
            f"{point['far_target']:g}",
            f"{point['threshold']:.4f}",
            f"{held['far']:.3g}{_interval(held['far_interval'])}",
            f"{held['frr']:.3g}{_interval(held['frr_interval'])}",
        )
        for point, held in zip(tested.operating_points, tested.transfers, strict=False)
    ]
    yield from _table(("FAR asked for", "threshold", "FAR on test (95 %)", "FRR on test (95 %)"), rows)


def _worst(model: Checkpoint, tested: Tested) -> Iterable[str]:
    if not tested.worst:
        yield "The embeddings are collapsed: no threshold tells any class from another."
        return
    ends = f"{model.config.evaluate.far_min:g} to {model.config.evaluate.far_max:g}"
    yield f"Test classes of the lowest utility, the mean over thresholds of FAR {ends}:"
    yield from (f"- {_plain(name)}: {utility:.3f}" for name, utility in tested.worst)


def _limits(model: Checkpoint, tested: Tested) -> Iterable[str]:
    yield (
        f"- The figures are of classes of {model.config.data.dataset}. For images of another kind, measure anew and "
        "set thresholds on your own classes (`python -m cluster.evaluate`)."
    )
    if tested.toy:
        yield "- A toy: so few classes are held out that OPIS and the thresholds say little."
    opis, floor = tested.metrics["test/opis"], tested.metrics["test/opis_noise_floor"]
    if opis < 2 * floor:
        yield "- OPIS is near its noise floor: the pairs are too few to tell more consistent models apart."
    known = {point["far_target"] for point in tested.operating_points}
    lost = [f"{target:g}" for target in FAR_TARGETS if target not in known]
    if lost:
        yield f"- No threshold for FAR {', '.join(lost)}: val has too few pairs to tell it from 0."
    yield "- The best epoch and settings were chosen on val: figures on val flatter the model, those above do not."
    yield "- Nobody has measured it against attacks, or for differences between groups of people."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield ""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.2g} to {ends[1]:.2g})"


def _plain(text: str) -> str:
    """A name as code, on one line, whatever is in it."""
    shown = " ".join(text.replace("`", "'").replace("|", "/").split())
    return f"`{shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + '...'}`"


def _place(source: str) -> str:
    """Where weights came from, without the folders of somebody's machine and without a password."""
    return source if source.startswith("models:") else source.rstrip("/").rpartition("/")[2]
