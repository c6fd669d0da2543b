"""The command line: ``python -m qmimic_d2 COMMAND ...``; see :mod:`qmimic_d2.cli`."""

import argparse
import ast
import difflib
import importlib
import importlib.util
import sys
from typing import Any, Optional, Sequence, TextIO

from qmimic_d2 import __version__
from qmimic_d2.cli import COMMANDS
from qmimic_d2.cli.printable import say
from qmimic_d2.cli.usage import split_overrides, usage_errors
from qmimic_d2.library_noise import hush_libraries

__all__ = ["build_parser", "main"]


class _Parser(argparse.ArgumentParser):
    """Escapes what a terminal would act on in the arguments that argparse repeats."""

    def _print_message(self, message: str, file: Optional[TextIO] = None) -> None:
        if message:
            say(message.rstrip("\n"), sys.stderr if file is None else file)


class _CommandParser(_Parser):
    """
    Imports its command's module when the command is used: ``predict`` needs no torch, and others would load it.

    Args:
        module: of the command; "" for a parser whose arguments are added by hand.
    """

    def __init__(self, *args: Any, module: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._module = module

    def parse_known_args(self, args=None, namespace=None):
        if self._module and self.get_default("run") is None:
            with usage_errors():
                module = importlib.import_module(self._module)
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # told with the usage of this command, not with that of all
            near = difflib.get_close_matches(unknown[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f'; near options are {near}' if near else ''}")
        return namespace, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; ``run`` of the parsed arguments is the chosen one's function."""
    parser = _Parser(
        prog="python -m qmimic_d2",
        description="Quantization mimic for Detectron2. Training and evaluation are train_net.py's.",
        epilog="python -m qmimic_d2 COMMAND --help lists the arguments of a command.",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="before COMMAND: import a module of yours first, which registers data sets or backbones; its code runs",
    )
    parser.add_argument("--version", action="version", version=f"qmimic_d2 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    for name in COMMANDS:
        module = f"qmimic_d2.cli.{name}"
        documentation = _docstring(module)
        commands.add_parser(
            name.replace("_", "-"),
            module=module,
            help=documentation.splitlines()[0],
            description=documentation,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Runs a command, and returns its exit status: 130 after Ctrl-C.

    Args:
        argv: arguments after the program's name; None for those of the process.

    Raises:
        SystemExit: after ``--help``; with status 2 after a mistake in the arguments or ``--import``, or without any.
    """
    hush_libraries()
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    args = parser.parse_args(arguments)
    if hasattr(args, "opts"):
        args.opts += overrides
    elif overrides:
        parser.error(f"this command takes no KEY VALUE pairs, got {' '.join(overrides)}")
    with usage_errors():
        for module in args.modules:
            importlib.import_module(module)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        say("stopped by Ctrl-C", sys.stderr)
        return 130


def _docstring(module: str) -> str:
    """A module's docstring, without importing it."""
    source = importlib.util.find_spec(module).loader.get_source(module)
    return ast.get_docstring(ast.parse(source))


if __name__ == "__main__":
    sys.exit(main())
