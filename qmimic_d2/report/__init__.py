"""
One HTML page about runs of train_net.py: ``collect`` reads their folders, ``measure`` finds out what the files do not
hold, ``page`` writes the page.

The page is made with jinja2 and matplotlib, the extra "report"; reading run folders needs neither, so ``page`` is not
imported here.
"""

from qmimic_d2.report.collect import Run, collect_run, collect_runs

__all__ = ["Run", "collect_run", "collect_runs"]
