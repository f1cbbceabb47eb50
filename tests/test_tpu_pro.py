"""The preset pro, compiled by the real TPU compiler: `make test-tpu`.

Two of its programs at once take more memory than a small machine has (11 to 16 GB each), so that they
have a file of their own, which one worker runs (pytest-xdist, --dist loadfile).
"""

from __future__ import annotations

import pytest

from tests import test_tpu
from tests.conftest import Command
from tests.test_tpu import (
    compiled,
    require_inference_fits,
    require_little_is_sent,
    require_training_fits,
)

pytestmark = [*test_tpu.pytestmark, pytest.mark.slow]


@pytest.mark.parametrize(
    ("length", "topology"),
    # Its state alone, 16 bytes a parameter, is as large as the memory of the largest slice of v5e.
    [("4k", "v5p:4x4x4"), ("2k", "v4:8x8x8"), ("2k", "v6e:16x16")],
)
def test_training_fits(gemtool: Command, length: str, topology: str) -> None:
    row = compiled(gemtool, "train", "pro", topology, "--length", length)
    require_training_fits(row, kernels={"gmm", "tgmm"})


@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4"])
def test_decoding_fits(gemtool: Command, topology: str) -> None:
    row = compiled(gemtool, "decode", "pro", topology, "--length", "1M")
    require_inference_fits(row, kernels={"gmm", "block_attention"})
    require_little_is_sent(row)


@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4"])
def test_prefill_fits(gemtool: Command, topology: str) -> None:
    """It ends with keys and values of the one global layer: those behind keep none, and no experts
    are computed. Weights are gathered for each chunk, and what is sent does not grow."""
    row, shorter = (
        compiled(gemtool, "prefill", "pro", topology, "--length", length)
        for length in ("1M", "100k")
    )
    require_inference_fits(row, kernels=set())
    assert row["collectives"] == shorter["collectives"]
