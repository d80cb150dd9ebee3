"""The table of all losses, from the losses themselves: `python -m dml.losses.table > docs/losses.md`."""

import inspect
import re

from dml.losses import LOSSES
from dml.losses.loss import Loss, TupleLoss
from dml.losses.tcm import TCM

# Authors, title, venue and year, perhaps a number of arXiv, at the beginning of a paragraph.
_PAPER = re.compile(r"[A-Z].+?,.+? (?:19|20)\d\d(?:, arXiv \d{4}\.\d{4,5})?(?=[.;])")

_PREAMBLE = """\
# Losses

Made by `python -m dml.losses.table > docs/losses.md`; a test fails when it is out of date. The formula of each loss is
in its docstring.

`--loss.name` takes a name, `--loss.options` that loss's options, which are shown with their defaults. *Needs*: what the
loss is told of data and encoder for parameters of its own, which are trained at `--optim.loss-lr`. *Tuples*: the miner
that a loss over tuples has unless `--loss.miner` names another; `--loss.rho` rewrites its tuples. *Memory*: whether it
sees the cross-batch memory of `--memory.size`. TCM is no `--loss.name`: `--tcm.weight` adds it to any of them.

Any other loss plugs in as `--loss.name package.module:Class`: a `torch.nn.Module` called with (embeddings, labels) of
the whole batch, for example `pytorch_metric_learning.losses:CircleLoss`. Options become keyword arguments of its
constructor, whole numbers as int; a `num_classes`, and an `embedding_size`, `embedding_dim` or `dim`, that it takes
without a default is given to it. Every Ray worker must be able to import it. A checkpoint keeps the name and never
imports it.
"""


def table() -> str:
    """The table in Markdown, with what a reader needs to know before it."""
    head = ("name", "what it does", "options", "needs", "tuples", "memory", "paper")
    rows = [head, tuple("---" for _ in head)]
    rows += [_row(name, LOSSES[name]) for name in sorted(LOSSES)] + [_row("TCM", TCM)]
    return _PREAMBLE + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def papers(cls: type[Loss]) -> list[str]:
    """The papers with which a loss's docstring begins a paragraph: authors, title, venue and year."""
    return [f"{found.group()}." for text in _paragraphs(cls) if (found := _PAPER.match(text))]


def _paragraphs(cls: type[Loss]) -> list[str]:
    return [" ".join(text.split()) for text in (inspect.getdoc(cls) or "").split("\n\n")]


def _row(name: str, cls: type[Loss]) -> tuple[str, ...]:
    options = [
        f"{option} {_number(parameter.default)}"
        for option, parameter in inspect.signature(cls).parameters.items()
        if option not in (*cls.needs, "miner", "rho")
    ]
    return (
        f"[`{name}`](../{cls.__module__.replace('.', '/')}.py)",
        _paragraphs(cls)[0],
        ", ".join(options),
        ", ".join(sorted(cls.needs, reverse=True)),
        (cls.default_miner or "all pairs") if issubclass(cls, TupleLoss) else "",
        "yes" if cls.takes_memory else "",
        " ".join(papers(cls)),
    )


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    print(table(), end="")
