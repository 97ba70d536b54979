"""The official `wan2.1_t2v_infer.py`: text to video with TurboDiffusion's Wan 2.1 files."""

from __future__ import annotations

from collections.abc import Sequence

from ..terminal import exit_codes
from . import official

PROGRAM = "wan2_1_t2v_infer"
MODELS = ("Wan2.1-1.3B", "Wan2.1-14B")


def parser() -> official.Parser:
    """All flags of the official script."""
    flags = official.Parser(PROGRAM, "Text to video, Wan 2.1.", MODELS, sigma_max=80, resolution="480p")
    flags.add_argument("--dit_path", required=True, help="the transformer's file")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; `argv` is the process's own by default. Exit codes as in `terminal.exit_codes`."""
    with exit_codes(PROGRAM):
        args = parser().parse_args(argv)
        print(official.run(args, {"transformer": args.dit_path}))


if __name__ == "__main__":
    main()
