"""`turbowan`: the commands."""

from __future__ import annotations

import os

import typer

from ..terminal import exit_codes
from .bench import app as bench_app
from .comfy import app as comfy_app
from .convert import convert
from .doctor import doctor
from .download import download
from .evaluate import app as evaluate_app
from .generate import generate
from .quantize import quantize
from .train import app as train_app

app = typer.Typer(
    name="turbowan",
    help="Fast Wan 2.1 / 2.2 video generation in one to four steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(convert)
app.command()(doctor)
app.command()(download)
app.command()(quantize)
app.add_typer(bench_app, name="bench")
app.add_typer(comfy_app, name="comfy")
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 bad input or a machine that cannot, 130 interrupted."""
    # Before PyTorch is there: its CPU threads (GNU OpenMP's) spin for microseconds, then sleep. Two threads on two
    # cores that also had other work took 87 s where sleeping ones took 15; on idle cores this costs 2 to 4 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    with exit_codes("turbowan"):
        app()


if __name__ == "__main__":
    main()
