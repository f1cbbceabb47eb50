"""Ahead of time: compile the real programs for TPU slices that are not here, and say what they take.

`programs.py` lowers a training, prefill or decode step on the abstract devices of `topology.py`;
`hlo.py` reads operations, bytes and collectives off the compiled program; `report.py` says whether
it fits, how long a step takes at best and what dominates.
"""
