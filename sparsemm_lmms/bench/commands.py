"""`sparsemm-lmms bench ...`: one command a measurement, each in a module of its own that imports nothing heavy."""

from __future__ import annotations

import typer

from sparsemm_lmms.bench import scoring, speed

app = typer.Typer()
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
app.add_typer(bench, name="bench")
bench.command("scoring")(scoring.scoring)
for _command in (speed.decode, speed.prefill, speed.kernels, speed.compression, speed.memory):
    bench.command(_command.__name__)(_command)
