"""Figures from results: they hold no state, open no window and need no display.

    figure = plots.utility_curves(threshold_curves(embeddings, labels))
    figure.savefig("utility.png", dpi=150)

Every function returns a new `matplotlib.figure.Figure`; none loads pyplot.
"""

from dml.plots.classes import class_far
from dml.plots.errors import distance_histograms, error_rates
from dml.plots.search import search_scatter
from dml.plots.sheet import contact_sheet, pick_queries
from dml.plots.space import embedding_map, spectrum
from dml.plots.utility import LINES, compare_utility, utility_curves

__all__ = [
    "LINES",
    "class_far",
    "compare_utility",
    "contact_sheet",
    "distance_histograms",
    "embedding_map",
    "error_rates",
    "pick_queries",
    "search_scatter",
    "spectrum",
    "utility_curves",
]
