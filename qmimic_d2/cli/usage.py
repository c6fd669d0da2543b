"""A user's mistakes on the command line, and KEY VALUE pairs at its end; torch is not needed."""

import re
import sys
from contextlib import contextmanager
from typing import Iterator, List, Sequence, Tuple

from qmimic_d2.cli.printable import say
from qmimic_d2.error_text import describe_error

__all__ = ["split_overrides", "usage_errors"]

_TRAINING = "This takes what training takes: Detectron2, and qmimic_d2[train]; docs/install.md says how to get them"
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within the block, a user's mistake is one line on stderr and exit status 2, without a traceback."""
    try:
        yield
    except (KeyError, ValueError, OSError, ImportError) as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        remedy = f". {_TRAINING}" if missing in ("detectron2", "torch", "torchvision") else ""
        say(f"{describe_error(error)}{remedy}", sys.stderr)
        raise SystemExit(2) from None


def split_overrides(argv: Sequence[str]) -> Tuple[List[str], List[str]]:
    """
    Splits KEY VALUE pairs off the end of the arguments.

    argparse alone takes them for further values of a flag before them that takes several.

    Returns:
        The arguments before the pairs, and the pairs. Without Detectron2, which knows the keys, there are none.
    """
    end = len(argv)
    if end >= 2 and _KEY.fullmatch(argv[-2]):
        try:
            from detectron2.config import get_cfg

            from qmimic_d2.config import add_qmimic_config
        except ImportError:
            return list(argv), []
        cfg = get_cfg()
        add_qmimic_config(cfg)
        while end >= 2 and _KEY.fullmatch(argv[end - 2]) and argv[end - 2].partition(".")[0] in cfg:
            end -= 2
    return list(argv[:end]), list(argv[end:])
