"""
The sub-commands of ``python -m qmimic_d2``, one module each.

A module's docstring is its help, the first line of it the summary. It has ``add_arguments(parser)``, and
``run(args)``, which returns the exit status: 0 where all went well, 2 for a mistake of the user's (which
:func:`qmimic_d2.cli.model_arguments.usage_errors` reports), anything else as the module's docstring says.
"""

# Module names; the command has "-" for "_". A new sub-command needs its module and its name here.
COMMANDS = (
    "cache",
    "calibrate",
    "data",
    "distill",
    "eval_widerface",
    "export",
    "predict",
    "report",
    "size",
)
