"""Cases as users write them."""

from __future__ import annotations

import pytest

from turbowan.errors import RequestError
from turbowan.evaluate.case import read_case, read_cases


def test_a_model_alone_leaves_everything_to_its_manifest() -> None:
    case = read_case("run/my model")
    assert (case.name, case.model, case.exact) == ("run/my model",) * 3
    assert (case.request.num_steps, case.request.sampler, case.request.attention) == (None, None, "auto")


def test_options_become_a_request() -> None:
    options = "steps=3,attention=sla,sla_topk=0.2,precision=bf16,sampler=rcm,ode=true,sigma_max=120,exact=base"
    case = read_case(f"tiny:{options}")
    request = case.request
    assert (case.model, case.exact) == ("tiny", "base")
    assert (request.num_steps, request.attention, request.sla_topk) == (3, "sla", 0.2)
    assert (request.precision, request.sampler, request.ode, request.sigma_max) == ("bf16", "rcm", True, 120.0)
    assert read_case("tiny:ode=false,guidance_scale=2.5,shift=3,boundary=0.8").request.guidance_scale == 2.5


def test_a_path_may_hold_colons_and_equal_signs() -> None:
    assert read_case(r"C:\models\tiny").model == r"C:\models\tiny"
    case = read_case(r"C:\run=3\tiny:steps=2")
    assert (case.model, case.request.num_steps) == (r"C:\run=3\tiny", 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (":steps=2", "names no model"),
        ("tiny:step=2", "'step=2' is not key=value with a key of steps, attention"),
        ("tiny:steps=2,ode", "'ode' is not key=value"),
        ("tiny:steps=2.5", "steps must be a whole number, got '2.5'"),
        ("tiny:ode=yes", "ode must be true or false, got 'yes'"),
        ("tiny:sla_topk=3", r"sla_topk must be in \(0, 1\], got 3"),
        ("tiny:attention=flash", "attention must be one of auto, original, sla, sagesla, got 'flash'"),
    ],
)
def test_a_case_that_cannot_be_says_why(text: str, line: str) -> None:
    with pytest.raises(RequestError, match=line):
        read_case(text)


def test_the_first_case_is_the_reference_unless_another_is_named() -> None:
    cases, against = read_cases(["a", "b:steps=1"], None)
    assert ([case.name for case in cases], against) == (["a", "b:steps=1"], "a")
    cases, against = read_cases(["a", "b"], "b")
    assert ([case.name for case in cases], against) == (["a", "b"], "b")
    cases, against = read_cases(["a"], "base:steps=9")
    assert ([case.name for case in cases], against) == (["base:steps=9", "a"], "base:steps=9")
    cases, against = read_cases(["a"], "world", also=("world",))
    assert ([case.name for case in cases], against) == (["a"], "world")
    with pytest.raises(RequestError, match="case 'a' is given twice"):
        read_cases(["a", "b", "a"], "b")
