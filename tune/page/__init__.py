"""The page that a search leaves behind: one HTML file that needs no network.

where = page.publish(findings, run, folder)
"""

from tune.page.document import render
from tune.page.findings import Findings
from tune.page.importance import importances
from tune.page.publish import NAME, publish

__all__ = ["NAME", "Findings", "importances", "publish", "render"]
