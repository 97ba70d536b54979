"""Small tensors: a second thread would cost more than it gives."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_few_threads) -> None:
    torch.set_num_threads(1)
