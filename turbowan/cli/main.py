"""`turbowan`: the commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import sys
import warnings

import typer

from ..errors import TurbowanError
from .bench import app as bench_app
from .evaluate import app as evaluate_app
from .train import app as train_app

app = typer.Typer(
    name="turbowan",
    help="Fast Wan 2.1 / 2.2 video generation in one to four steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 bad input or a machine that cannot, 130 interrupted."""
    warnings.showwarning = _show_warning
    try:
        app()
    except TurbowanError as error:
        print(f"turbowan: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("turbowan: stopped", file=sys.stderr)
        sys.exit(130)


def _show_warning(message: Warning | str, category: type[Warning], *rest: object) -> None:
    if category is UserWarning:
        print(f"turbowan: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
