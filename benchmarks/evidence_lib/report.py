"""Writes what is known: ``summary.json``, ``tables.md``, plots, and the tables in a document."""

import os
from typing import List, Sequence

from evidence_lib.records import versions
from evidence_lib.runs import Runs
from evidence_lib.summary import GroupSummary, summarize, to_dict
from evidence_lib.tables import group_section, insert_between_markers, seed_table
from qmimic_d2.json_file import write_json, write_text

__all__ = ["write_report"]

_MARKER = "evidence"


def write_report(runs: Runs, folder: str, document: str = "") -> List[str]:
    """
    Args:
        runs: with the records to report.
        folder: for ``summary.json``, ``tables.md`` and ``plots/``.
        document: a Markdown file with the markers ``<!-- evidence: begin -->`` and ``end``; "" = none.

    Returns:
        Paths of the files that were written.

    Raises:
        ValueError: the document has no such markers.
    """
    os.makedirs(folder, exist_ok=True)
    summaries = summarize(runs)
    summary_path, tables_path = os.path.join(folder, "summary.json"), os.path.join(folder, "tables.md")
    write_json(summary_path, {"versions": versions(), **to_dict(summaries)})
    write_text(tables_path, "# Tables of the evidence\n\n" + "\n\n".join(map(_with_seeds, summaries)) + "\n")
    plots = {each.group.name: _draw(each, os.path.join(folder, "plots")) for each in summaries}
    written = [summary_path, tables_path, *(path for paths in plots.values() for path in paths)]
    if document:
        with open(document, encoding="utf-8") as file:
            text = file.read()
        place = os.path.dirname(document)
        sections = [group_section(each) + _images(plots[each.group.name], place) for each in summaries]
        write_text(document, insert_between_markers(text, _MARKER, "\n\n".join(sections)))
        written.append(document)
    return written


def _draw(summary: GroupSummary, folder: str) -> List[str]:
    try:
        from evidence_lib.plots import draw_group  # matplotlib is an extra
    except ModuleNotFoundError:
        return []
    return draw_group(summary, folder)


def _images(paths: Sequence[str], place: str) -> str:
    """Markdown of pictures in a document that stands in the folder ``place``."""
    links = [os.path.relpath(path, place).replace(os.sep, "/") for path in paths]
    return "".join(f"\n\n![{os.path.splitext(os.path.basename(link))[0]}]({link})" for link in links)


def _with_seeds(summary: GroupSummary) -> str:
    parts = [group_section(summary, heading="##")]
    if summary.has_results:
        parts += ["AP of every run:", seed_table(summary)]
    return "\n\n".join(parts)
