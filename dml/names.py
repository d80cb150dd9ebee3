"""Messages for a name that is not among the valid ones."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """One line that names what was asked for and what there is, nearest match first.

    >>> unknown("loss", "multi_similarty", ["contrastive", "multi_similarity"])
    "unknown loss 'multi_similarty'; valid: multi_similarity, contrastive"
    """
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    rest = [other for other in names if other not in near]
    shown = (near + rest)[:30]
    more = f", ... ({len(names) - len(shown)} more)" if len(names) > len(shown) else ""
    return f"unknown {kind} {name!r}; valid: {', '.join(shown)}{more}"
