"""What is compared: a model with its way of sampling, written `tiny`, or `tiny:steps=1,attention=original`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..request import GenerateRequest


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# key -> field of a request, how its value is read, what to say of one that cannot be
_KEYS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "steps": ("num_steps", int, "a whole number"),
    "attention": ("attention", str, "a name"),
    "sla_topk": ("sla_topk", float, "a number"),
    "precision": ("precision", str, "a name"),
    "sampler": ("sampler", str, "a name"),
    "guidance_scale": ("guidance_scale", float, "a number"),
    "sigma_max": ("sigma_max", float, "a number"),
    "shift": ("shift", float, "a number"),
    "boundary": ("boundary", float, "a number"),
    "ode": ("ode", _flag, "true or false"),
}


@dataclass(frozen=True)
class Case:
    """One column of a comparison.

    name: as it was written. model: embedded name, folder or manifest. request: how it is sampled. exact: the model
    whose float32 dense latents are the measure of this one's; the same model where nothing is given.
    """

    name: str
    model: str
    request: GenerateRequest
    exact: str


def read_case(text: str) -> Case:
    """A case from MODEL[:key=value,...].

    Args:
        text: keys are steps, attention, sla_topk, precision, sampler, guidance_scale, sigma_max, shift, boundary, ode
            and exact (another model for the latent error: of a quantised one, the model it was made from).

    Raises:
        RequestError: no model, an unknown key, or a value out of range.
    """
    model, _, options = text.rpartition(":") if "=" in text.rpartition(":")[2] else (text, "", "")
    if not model:
        raise RequestError(f"case '{text}' names no model; write MODEL or MODEL:key=value,...")
    values: dict[str, Any] = {}
    exact = model
    for option in options.split(",") if options else ():
        key, equals, value = option.partition("=")
        if key == "exact" and value:
            exact = value
            continue
        if key not in _KEYS or not equals:
            raise RequestError(f"case '{text}': '{option}' is not key=value with a key of {', '.join(_KEYS)}, exact")
        field, read, words = _KEYS[key]
        try:
            values[field] = read(value)
        except (ValueError, KeyError):
            raise RequestError(f"case '{text}': {key} must be {words}, got '{value}'") from None
    try:
        return Case(text, model, GenerateRequest(prompt="-", **values), exact)
    except RequestError as error:
        raise RequestError(f"case '{text}': {error}") from error


def read_cases(texts: Sequence[str], against: str | None, also: Sequence[str] = ()) -> tuple[list[Case], str]:
    """Cases, and the name of the one they are compared with.

    Args:
        texts: one case each. against: the reference, itself a case if it is none of them; None takes the first case.
        also: further names that `against` may have.

    Raises:
        RequestError: a case is given twice, or cannot be read.
    """
    every = [*([against] if against and against not in (*texts, *also) else []), *texts]
    double = next((text for text in every if every.count(text) > 1), None)
    if double:
        raise RequestError(f"case '{double}' is given twice")
    return [read_case(text) for text in every], against or every[0]
