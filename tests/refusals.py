"""Checks of a run that a test expects to pass or to be refused: ``from refusals import refusal``."""

from pathlib import Path
from typing import Any, Dict

import pytest

from qmimic_d2.engine import check_run, describe_error, load_config


def files(folder: Path) -> Dict[Path, int]:
    """Everything below a folder, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def check(student: str, *opts: Any, num_processes: int = 1, eval_only: bool = False, resume: bool = False) -> None:
    """What train_net.py does before a run of a student's YAML with KEY VALUE pairs over it."""
    cfg = load_config(student, [str(each) for each in opts], eval_only=eval_only, resume=resume)
    check_run(cfg, num_processes, eval_only=eval_only, resume=resume)


def refusal(student: str, *opts: Any, **options: Any) -> str:
    """The message with which a run is refused; nothing in the YAML's folder changes, and no OUTPUT_DIR is made."""
    folder = Path(student).parent
    before = files(folder)
    with pytest.raises((ValueError, KeyError, OSError)) as refused:
        check(student, *opts, **options)
    assert files(folder) == before
    assert not (folder / "output").exists()
    return describe_error(refused.value)
