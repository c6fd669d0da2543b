"""The page: one HTML file with everything in it, which loads nothing."""

import base64
import hashlib
import platform
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Sequence

import detectron2
import torch

from qmimic_d2.files import write_text
from qmimic_d2.report import plots
from qmimic_d2.report.charts import agreement_charts, histogram_charts, size_charts, training_charts
from qmimic_d2.report.collect import Run
from qmimic_d2.report.facts import describe_run, split_common
from qmimic_d2.report.measure import Measurements, measure
from qmimic_d2.report.samples import GROUND_TRUTH
from qmimic_d2.report.tables import class_columns, class_names, held_out_columns, held_out_rows, result_columns

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError("the report needs jinja2: pip install jinja2 matplotlib") from error

__all__ = ["render_page", "write_report"]

_FOLDER = Path(__file__).parent


def write_report(
    runs: Sequence[Run],
    path: str,
    *,
    title: str = "Quantization Mimic",
    made_by: str = "qmimic_d2",
    num_images: int = 6,
    threads: int = 1,
    score_threshold: float = 0.5,
) -> None:
    """
    Measures what the runs' files do not hold, and writes the page.

    Args:
        runs: in the order in which the page shows them; what turns out to be missing is added to their ``notes``.
        path: of the HTML file.
        made_by: program and version, for the page's last line.
        num_images, threads, score_threshold: as in :func:`qmimic_d2.report.measure.measure`.
    """
    measured = measure(runs, num_images=num_images, threads=threads, score_threshold=score_threshold)
    written = datetime.now().strftime("%Y-%m-%d %H:%M")
    versions = f"PyTorch {torch.__version__}, Detectron2 {detectron2.__version__}"
    footer = f"Written {written} by {made_by} with {versions}, {platform.system()} {platform.machine()}."
    page = render_page(runs, measured, title=title, footer=footer, score_threshold=score_threshold)
    # JSON and file names may hold halves of characters, which UTF-8 cannot write.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def render_page(
    runs: Sequence[Run], measured: Measurements, *, title: str, footer: str, score_threshold: float
) -> str:
    """The page's HTML. Nothing is measured here, or read but the template, the style and the script."""
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    facts = [describe_run(run) for run in runs]
    common, differing = split_common(facts)
    missing: Dict[str, List[int]] = {}  # numbers of the runs, by what they lack
    for number, run in enumerate(runs):
        for note in dict.fromkeys(run.notes):
            missing.setdefault(note, []).append(number)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        footer=footer,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=f"sha256-{digest}",  # by which the content security policy knows the script
        as_svg=Markup,  # of plots, which are made here; matplotlib has escaped whatever text is in them
        looks=[plots.look(number) for number in range(len(runs))],
        GROUND_TRUTH=GROUND_TRUTH,
        runs=runs,
        facts=facts,
        common=common,
        differing=differing,
        results=result_columns(runs, measured.costs),
        classes=class_names(runs),
        class_columns=class_columns(runs),
        size_charts=size_charts(runs, measured.costs),
        training_charts=training_charts(runs),
        agreement_charts=agreement_charts(runs),
        histograms=histogram_charts(runs),
        held_out_rows=held_out_rows(runs),
        held_out_columns=held_out_columns(runs),
        rows=measured.samples,
        dataset_sizes=measured.dataset_sizes,
        score_threshold=score_threshold,
        missing=missing,
    )
