"""`--compile-only` of train, prefill and decode."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Literal

from gemtool import log
from gemtool.aot.topology import open_topology, prepare_process
from gemtool.errors import UsageError
from gemtool.runtime import setup_jax


@dataclass(frozen=True)
class CompileOptions:
    """What is to be compiled, and for what; see the help of the verbs."""

    topology: str | None
    model: str | None = None
    ckpt: str | None = None
    data: tuple[str, ...] = ()
    mesh: str | None = None
    length: int | None = None
    batch: int | None = None
    accumulate: int = 1
    chunk: int | None = None
    dtype: str | None = None
    remat: bool | None = None
    scan: bool | None = None
    kernels: str | None = None


TRAINING_LENGTH = 4_096
CONTEXT_LENGTH = 1_000_000


def compile_only(verb: Literal["train", "prefill", "decode"], options: CompileOptions) -> None:
    """Compiles the program of a verb, and reports: JSON into a pipe, a table on a terminal.

    Raises:
        UsageError, GemtoolError: there is no such slice, or the model does not fit the mesh; the TPU
            compiler is not installed.
    """
    if options.topology is None:
        raise UsageError("--compile-only: name the slice with --topology, as in v5p:4x4x4")
    prepare_process()
    setup_jax(keep_programs=False, kernels=options.kernels)
    from gemtool.aot import programs
    from gemtool.aot.report import compile_program, table
    from gemtool.checkpoint import open_checkpoint
    from gemtool.data.settings import MediaSettings
    from gemtool.infer.engine import default_chunk
    from gemtool.model.execution import chosen
    from gemtool.model.mesh import describe, parse_mesh
    from gemtool.train.loader import open_data
    from gemtool.train.loop import fit_to_data, load_model, require_parts

    topology = open_topology(options.topology)
    if options.ckpt is not None:
        config = open_checkpoint(options.ckpt).config
    else:
        config = load_model(options.model or "nano")
    length = options.length
    if options.data:
        shards, _ = open_data(options.data[0])
        length = shards.length
        settings = MediaSettings.from_dict(shards.settings)
        config = fit_to_data(config, shards.manifest["vocab"]["size"], settings)
    execution = chosen("tpu", options.dtype, options.remat, options.scan)
    dtype = execution.dtype
    if options.mesh is not None:
        sizes = parse_mesh(options.mesh)
    elif verb == "train":
        sizes = programs.training_mesh(config, topology)
    else:
        sizes = programs.inference_mesh(config, topology)
    log.info(
        f"compiling {config.name} for {topology.name}, which takes some minutes if it is large"
    )
    if verb == "train":
        length = length or TRAINING_LENGTH
        shares = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
        batch = options.batch or shares * options.accumulate
        require_parts(batch, options.accumulate)
        given = {"batch": batch, "length": length, "accumulate": options.accumulate}
        program = programs.training_program(config, topology, sizes, execution, **given)
    else:
        length = length or CONTEXT_LENGTH
        given = {"length": length}
        if verb == "prefill":
            given["chunk"] = options.chunk or default_chunk(config)
            program = programs.prefill_program(config, topology, sizes, dtype, **given)
        else:
            program = programs.decode_program(config, topology, sizes, dtype, length=length)
    found = compile_program(program, topology)
    begin = {"model": config.name, "mesh": describe(sizes), "dtype": dtype, **given}
    row = {"program": found.pop("program"), **begin, **found}
    if sys.stdout.isatty():
        print(table(row), flush=True)
    else:
        print(json.dumps(row), flush=True)
        log.info(row["says"])
