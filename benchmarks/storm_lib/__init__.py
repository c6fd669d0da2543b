"""The parts of ``benchmarks/storm.py``: kills of trainings, mutated files, and the judgement of both."""
