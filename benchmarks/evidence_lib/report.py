"""Writes what is known: ``summary.json``, ``tables.md``, plots, and the tables in a document."""

import os
from typing import List, Sequence

from evidence_lib.overview import overview_to_dict, summarize_overview
from evidence_lib.records import versions
from evidence_lib.runs import Runs
from evidence_lib.summary import GroupSummary, summarize, to_dict
from evidence_lib.tables import group_section, insert_between_markers, overview_table, seed_table
from qmimic_d2.files import write_json, write_text

__all__ = ["write_report"]

_MARKER, _OVERVIEW_MARKER = "evidence", "evidence overview"


def write_report(runs: Runs, folder: str, document: str = "") -> List[str]:
    """
    Args:
        runs: with the records to report.
        folder: for ``summary.json``, ``tables.md`` and ``plots/``.
        document: a Markdown file with the markers ``<!-- evidence: begin -->`` and ``end``, and those of
            ``evidence overview`` where the matrix has one; "" = none.

    Returns:
        Paths of the files that were written.

    Raises:
        ValueError: the document has no such markers.
    """
    os.makedirs(folder, exist_ok=True)
    summaries = summarize(runs)
    summary_path, tables_path = os.path.join(folder, "summary.json"), os.path.join(folder, "tables.md")
    overview = runs.matrix.overview and summarize_overview(runs.matrix.overview, summaries)
    content = {"versions": versions(), **to_dict(summaries)}
    write_json(summary_path, {**content, "overview": overview_to_dict(overview)} if overview else content)
    write_text(tables_path, "# Tables of the evidence\n\n" + "\n\n".join(map(_with_seeds, summaries)) + "\n")
    plots_folder = os.path.join(folder, "plots")
    plotting = _plotting()
    overview_plots = plotting.draw_overview(overview, plots_folder) if plotting and overview else []
    plots = {each.group.name: plotting.draw_group(each, plots_folder) if plotting else [] for each in summaries}
    written = [summary_path, tables_path, *overview_plots, *(path for paths in plots.values() for path in paths)]
    if document:
        with open(document, encoding="utf-8") as file:
            text = file.read()
        place = os.path.dirname(document)
        sections = [group_section(each) + _images(plots[each.group.name], place) for each in summaries]
        text = insert_between_markers(text, _MARKER, "\n\n".join(sections))
        if overview:
            first = overview_table(overview) + _images(overview_plots, place)
            text = insert_between_markers(text, _OVERVIEW_MARKER, first)
        write_text(document, text)
        written.append(document)
    return written


def _plotting():
    """The module that draws; None without matplotlib, which is an extra."""
    try:
        import evidence_lib.plots as plotting
    except ModuleNotFoundError:
        return None
    return plotting


def _images(paths: Sequence[str], place: str) -> str:
    """Markdown of pictures in a document that stands in the folder ``place``."""
    links = [os.path.relpath(path, place).replace(os.sep, "/") for path in paths]
    return "".join(f"\n\n![{os.path.splitext(os.path.basename(link))[0]}]({link})" for link in links)


def _with_seeds(summary: GroupSummary) -> str:
    parts = [group_section(summary, heading="##")]
    if summary.has_results:
        parts += ["AP of every run:", seed_table(summary)]
    return "\n\n".join(parts)
