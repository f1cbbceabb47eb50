"""How the implementation of a kernel is chosen."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from gemtool.cmd.options import KernelName
from gemtool.errors import UsageError
from gemtool.kernels import dispatch


def unsupported(*_: Any) -> str:
    raise NotImplementedError("not for these shapes")


def test_dispatch_tries_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    table = {"reference": lambda: "slow", "xla": unsupported}
    assert dispatch.dispatch("thing", table, None) == "slow"
    with pytest.raises(NotImplementedError, match="not for these shapes"):
        dispatch.dispatch("thing", table, "xla")
    with pytest.raises(NotImplementedError, match="thing on cpu: xla: not for these shapes"):
        dispatch.dispatch("thing", {"xla": unsupported}, None)


def test_programs_for_another_platform_take_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    table = {"xla": lambda: 1, "gpu": lambda: 2, "pallas_tpu": lambda: 3}

    @jax.jit
    def chosen() -> Any:
        return dispatch.dispatch("thing", table, None)

    assert int(chosen()) == 1
    for platform, number in {"gpu": 2, "tpu": 3, "cpu": 1}.items():
        with dispatch.compiling_for(platform):
            assert dispatch.target_platform() == platform
            assert int(chosen()) == number  # traced anew, though jit knows the function
    with pytest.raises(ValueError, match="no platform 'cuda'"), dispatch.compiling_for("cuda"):
        pass
    assert int(chosen()) == 1


def test_dispatch_obeys_names(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"reference": lambda: "slow", "xla": lambda: "fast"}
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert dispatch.dispatch("thing", table, None) == "slow"
    assert dispatch.dispatch("thing", table, "xla") == "fast"
    with pytest.raises(ValueError, match="expected one of reference, xla"):
        dispatch.dispatch("thing", table, "cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    with pytest.raises(UsageError, match="GEMTOOL_KERNELS=cuda: no such kernels; name one of ref"):
        dispatch.dispatch("thing", table, None)


def test_what_is_forced_outranks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"reference": lambda: "slow", "xla": lambda: "fast"}
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    monkeypatch.setattr(dispatch, "_forced", None)
    dispatch.force("xla")
    assert dispatch.dispatch("thing", table, None) == "fast"
    with pytest.raises(UsageError, match="--kernels xla: thing: not for these shapes"):
        dispatch.dispatch("thing", {**table, "xla": unsupported}, None)
    dispatch.force("gpu")  # which this operation lacks: the platform's
    assert dispatch.dispatch("thing", table, None) == "fast"
    dispatch.force(None)
    assert dispatch.dispatch("thing", table, None) == "slow"


def test_the_option_knows_all_names() -> None:
    assert {*KernelName} == {*dispatch.NAMES}
