"""turbowan: fast Wan 2.1 / 2.2 video generation in one to four steps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine, Progress
    from .errors import TurbowanError
    from .media.saving import VideoFiles
    from .request import GenerateRequest, GenerateResult

__version__ = "0.1.0"
__all__ = ["Engine", "GenerateRequest", "GenerateResult", "Progress", "TurbowanError", "VideoFiles", "ops"]

_PLACES = {
    "Engine": ".engine",
    "Progress": ".engine",
    "GenerateRequest": ".request",
    "GenerateResult": ".request",
    "TurbowanError": ".errors",
    "VideoFiles": ".media.saving",
}


def __getattr__(name: str) -> Any:
    """Public names load their module when first used: importing the package imports no torch."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    if name == "ops":
        return import_module(".ops", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
