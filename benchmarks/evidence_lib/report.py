"""Writes what is known: ``summary.json``, ``tables.md``, plots, and the tables in a document."""

import os
from typing import List

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
    """
    os.makedirs(folder, exist_ok=True)
    summaries = summarize(runs)
    summary_path, tables_path = os.path.join(folder, "summary.json"), os.path.join(folder, "tables.md")
    write_json(summary_path, {"versions": versions(), **to_dict(summaries)})
    write_text(tables_path, "# Tables of the evidence\n\n" + "\n\n".join(map(_with_seeds, summaries)) + "\n")
    written = [summary_path, tables_path]
    if document:
        with open(document, encoding="utf-8") as file:
            text = file.read()
        sections = "\n\n".join(group_section(each) for each in summaries)
        write_text(document, insert_between_markers(text, _MARKER, sections))
        written.append(document)
    return written


def _with_seeds(summary: GroupSummary) -> str:
    parts = [group_section(summary, heading="##")]
    if summary.has_results:
        parts += ["AP of every run:", seed_table(summary)]
    return "\n\n".join(parts)
