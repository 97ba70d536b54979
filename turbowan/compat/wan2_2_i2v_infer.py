"""The official `wan2.2_i2v_infer.py`: image to video with TurboDiffusion's two Wan 2.2 experts."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError
from ..terminal import exit_codes
from . import official

PROGRAM = "wan2_2_i2v_infer"
MODELS = ("Wan2.2-A14B",)


def parser() -> official.Parser:
    """All flags of the official script."""
    flags = official.Parser(PROGRAM, "Image to video, Wan 2.2.", MODELS, sigma_max=200, resolution="720p")
    add = flags.add_argument
    add("--image_path", help="the picture the video starts from (required)")
    add("--high_noise_model_path", required=True, help="the high-noise expert's file")
    add("--low_noise_model_path", required=True, help="the low-noise expert's file")
    add("--boundary", type=float, default=0.9, help="time (0 to 1) below which the low-noise expert takes over")
    add("--adaptive_resolution", action="store_true", help="keep the picture's aspect ratio at the same area")
    add("--ode", action="store_true", help="the deterministic sampler: sharper, less robust")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; `argv` is the process's own by default. Exit codes as in `terminal.exit_codes`."""
    with exit_codes(PROGRAM):
        args = parser().parse_args(argv)
        if args.image_path is None and not args.serve:
            raise RequestError("--image_path is required")
        experts = {"high_noise": args.high_noise_model_path, "low_noise": args.low_noise_model_path}
        own = {name: getattr(args, name) for name in ("boundary", "adaptive_resolution", "ode")}
        print(official.run(args, experts, image=args.image_path, **own))


if __name__ == "__main__":
    main()
