"""What common models would do on common cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbowan.memory.catalog import COMMON, VIDEOS, common_model, plan_common, table_by_card
from turbowan.memory.room import Room

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_docs_have_the_table_of_today() -> None:
    """Made by `table_by_card`; put its result there when the plan changes."""
    assert table_by_card() in DOCS.read_text()


@pytest.mark.parametrize(
    ("name", "billions"), [("1.3B", 1.42), ("14B", 14.3), ("14B int8", 14.3), ("A14B-I2V int8", 14.3)]
)
def test_sizes_are_those_of_the_models(name: str, billions: float) -> None:
    model, work = common_model(name)
    size = model.parts[model.nets[0]]
    assert size.total / 1e9 == pytest.approx(billions * (1 if "int8" in name else 2), rel=0.03)
    assert len(size.blocks) == model.config.num_layers
    assert work.encodes_image == (len(model.nets) == 2)
    assert model.parts["text_encoder"].total == pytest.approx(11.36e9, rel=0.01)


def test_every_model_and_size_is_told() -> None:
    told = plan_common(Room(8 * 10**9, 32 * 10**9))
    assert len(told) == len(COMMON) * len(VIDEOS)
    fits = {(entry["model"], entry["size"]): entry["peak"] for entry in told}
    assert fits["1.3B", "832x480"] < 8e9
    refused = next(entry for entry in told if (entry["model"], entry["size"]) == ("14B", "1280x720"))
    assert refused["peak"] is None
    assert refused["summary"].startswith("denoise takes ")
