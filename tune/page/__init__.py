"""The page that a search leaves behind: one HTML file that needs no network.

run.text(page.render(findings), "report.html")
"""

from tune.page.document import render
from tune.page.findings import Findings

__all__ = ["Findings", "render"]
