"""
What benchmarks/evidence.py is made of.

``matrix`` says what is run, ``settings`` which runs are the same, ``records`` what is kept of a run, ``runs``
what is open and how it is run; ``statistics``, ``summary``, ``tables`` and ``plots`` make the report.
"""
