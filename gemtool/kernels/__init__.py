"""Numerical kernels: one public function an operation, several implementations, one test suite.

An operation is a package: `__init__.py` has the public signature and its meaning,
`reference.py` the slow and obviously right implementation, `xla.py` the fast one in plain XLA,
`pallas_tpu.py` and `gpu.py` those of Pallas kernels. `dispatch.py` chooses between them.
"""

from __future__ import annotations

from gemtool.kernels.attention import flash_attention
from gemtool.kernels.experts import expert_mlp

__all__ = ["expert_mlp", "flash_attention"]
