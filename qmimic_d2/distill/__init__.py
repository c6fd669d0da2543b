"""
From a user's data to a detector for a device: what ``python -m qmimic_d2 distill`` does.

``data_statistics`` looks at the data. ``choices`` turns them into settings, with a reason each. ``plan`` gives the YAML
files and the commands. ``step_seconds`` estimates the time, and ``outcome`` shows what came out.
"""
