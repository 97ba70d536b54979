"""Stage configurations from TOML."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from ..errors import CheckpointError, TurbowanError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "configs"
T = TypeVar("T")


def read_config(name: str, kind: type[T]) -> T:
    """Read a stage's configuration.

    Args:
        name: a shipped configuration (`tiny-vae`) or a path to a TOML file.
        kind: the dataclass it fills.

    Raises:
        CheckpointError: no such file, not TOML, or keys that the stage does not have.
    """
    path, values = _read(name)
    return _fill(kind, values, str(path))


def read_tables(name: str, **kinds: type) -> dict[str, Any]:
    """Read a configuration with a table for each of several dataclasses.

    Args:
        name: as `read_config`'s.
        kinds: the dataclass of each table; a table that is missing counts as empty.

    Raises:
        CheckpointError: as `read_config`'s, or a table that no part of the stage takes.
    """
    path, values = _read(name)
    unknown = sorted(set(values) - set(kinds))
    if unknown or not all(isinstance(table, dict) for table in values.values()):
        raise CheckpointError(f"{path} takes the tables {', '.join(kinds)}; got {', '.join(values)}")
    return {table: _fill(kind, values.get(table, {}), f"{path} [{table}]") for table, kind in kinds.items()}


def read_table(name: str, table: str, kind: type[T]) -> T:
    """One table of such a configuration, whatever else it holds."""
    path, values = _read(name)
    return _fill(kind, values.get(table, {}), f"{path} [{table}]")


def _read(name: str) -> tuple[Path, dict[str, Any]]:
    shipped = SHIPPED / f"{name}.toml"
    path = shipped if shipped.exists() else Path(name)
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
        raise CheckpointError(f"there is no configuration '{name}'; shipped ones: {known}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not TOML: {' '.join(str(error).split())}") from error


def _fill(kind: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} must be a table of settings, got {values!r}")
    unknown = sorted(set(values) - {f.name for f in fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise CheckpointError(f"{where} has keys this stage does not know: {', '.join(unknown)}")
    try:
        return kind(**values)
    except (TypeError, TurbowanError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_numbers(config: object, names: Sequence[str], least: float | None = None) -> None:
    """Raise CheckpointError unless these fields are numbers, and not below `least`."""
    for name in names:
        value = getattr(config, name)
        if not is_number(value) or (least is not None and value < least):
            wanted = "a number" if least is None else f"a number from {least:g} on"
            raise CheckpointError(f"{name} must be {wanted}, got {value!r}")


def check_positive(config: object, names: Sequence[str]) -> None:
    """Raise CheckpointError unless these fields are positive numbers."""
    for name in names:
        value = getattr(config, name)
        if not is_number(value) or value <= 0:
            raise CheckpointError(f"{name} must be a positive number, got {value!r}")


def check_whole(config: object, names: Sequence[str]) -> None:
    """Raise CheckpointError unless these fields are whole numbers from 0 on."""
    check_numbers(config, names, least=0)
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int):
            raise CheckpointError(f"{name} must be a whole number, got {value!r}")


def check_counts(config: object, names: Sequence[str]) -> None:
    """Raise CheckpointError unless these fields are whole numbers from 1 on."""
    check_positive(config, names)
    check_whole(config, names)


def check_pair(config: object, name: str) -> None:
    """Raise CheckpointError unless this field is two numbers."""
    value = getattr(config, name)
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(is_number, value)):
        raise CheckpointError(f"{name} must be two numbers, got {value!r}")
