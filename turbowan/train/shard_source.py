"""Batches from latent shards: in a random order over all of them, read in the background one step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..models.tokenizer import TEXT_LENGTH
from .data import Batch
from .shards import Shards, read_tensor

NEGATIVE_FILE = "negative.pt"  # beside the shards, where no other is given


class ShardSource:
    """A `Source` of shards: every clip once an epoch, each epoch in a new order.

    Row r of step s is place s * batch + r in the endless line of shuffled epochs, whichever process asks: a run that
    goes on sees what it would have seen, and processes read only their rows. Where an epoch ends inside a batch, the
    next one fills it. Texts of fewer than the 512 rows get a zero one, which stands for all that they leave out.

    Args:
        shards: what to read.
        batch: rows of the global batch.
        device: where batches go; to CUDA through pinned memory, without a wait.
        seed: of the order.
        negative: the unconditional branch's text, [l, D], or the file that holds it (the official one is
            `umT5_wan_negative_emb.pt`); by default `negative.pt` beside the first shard. A file is read at first use.
        workers: threads that read clips.

    Raises:
        CheckpointError: fewer clips than rows; in `batch` and `negative`, what cannot be read.
    """

    def __init__(
        self,
        shards: Shards,
        batch: int,
        device: torch.device | str,
        seed: int = 0,
        negative: Tensor | Path | None = None,
        workers: int = 4,
    ) -> None:
        if not 1 <= batch <= len(shards):
            raise CheckpointError(
                f"the batch of {batch:,} clips is no part of the {len(shards):,} in {len(shards.files):,} shards;"
                f" it must be 1 to {len(shards):,}"
            )
        self.shards, self.rows, self.device, self.seed = shards, batch, torch.device(device), seed
        self._given = shards.files[0].with_name(NEGATIVE_FILE) if negative is None else negative
        self._negative: Tensor | None = None
        self._orders: dict[int, Tensor] = {}
        self._coming: dict[tuple[int, range], Future[Batch]] = {}
        self._readers = ThreadPoolExecutor(workers, "read-clips")
        self._collector = ThreadPoolExecutor(1, "collect-batch")

    @property
    def text_dim(self) -> int:
        return self.shards.shapes["text"][1]

    @property
    def condition_channels(self) -> int:
        return self.shards.shapes["condition"][0] if "condition" in self.shards.shapes else 0

    @property
    def negative(self) -> Tensor:
        """float32 [1, L, D]; its last row stands for all up to the 512th."""
        if self._negative is None:
            given, width = self._given, self.shards.shapes["text"][1]
            text, name = (given, "the negative text") if isinstance(given, Tensor) else (_read(given), str(given))
            self._negative = _unconditional(text, width, name).to(self.device)
        return self._negative

    def batch(self, step: int, rows: range) -> Batch:
        """The given rows of the step's global batch, in float32; the next step's are read from here on.

        Raises:
            CheckpointError: a clip among them is damaged, not finite or of another shape.
        """
        ready = self._coming.pop((step, rows), None) or self._collect(step, rows)
        for key in [key for key in self._coming if key[0] not in (step, step + 1)]:
            self._coming.pop(key).cancel()
        if (step + 1, rows) not in self._coming:
            self._coming[step + 1, rows] = self._collect(step + 1, rows)
        read = ready.result()
        condition = None if read.condition is None else self._place(read.condition)
        return Batch(self._place(read.latents), self._place(read.text), condition)

    def numbers(self, step: int, rows: range) -> list[int]:
        """Which clips these rows of a step are."""
        if not 0 <= min(rows) <= max(rows) < self.rows:
            raise ValueError(f"rows {rows} are not of a global batch of {self.rows}")
        found = []
        for row in rows:
            epoch, place = divmod(step * self.rows + row, len(self.shards))
            if epoch not in self._orders:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
                self._orders[epoch] = torch.randperm(len(self.shards), generator=generator)
            found.append(int(self._orders[epoch][place]))
        return found

    def close(self) -> None:
        """End the threads; what they are reading is dropped."""
        for pool in (self._collector, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _collect(self, step: int, rows: range) -> Future[Batch]:
        return self._collector.submit(self._read_batch, self.numbers(step, rows))

    def _read_batch(self, numbers: list[int]) -> Batch:
        """On the CPU, in the files' dtype; pinned for a CUDA device."""
        samples = list(self._readers.map(self.shards.__getitem__, numbers))
        conditions = [sample.condition for sample in samples if sample.condition is not None]
        return Batch(
            self._stack([sample.latent for sample in samples]),
            self._stack([_closed(sample.text) for sample in samples]),
            self._stack(conditions) if conditions else None,
        )

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        if self.device.type != "cuda":
            return torch.stack(tensors)
        with torch.cuda.device(self.device):  # a thread's own is GPU 0, whichever this process uses
            return torch.stack(tensors).pin_memory()

    def _place(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True).float()


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; guidance needs the negative prompt's embedding: name its file")
    return read_tensor(path, str(path))


def _closed(text: Tensor) -> Tensor:
    """[L, D] to [L + 1, D], the last row zero, unless all 512 are there.

    Always, not only where the last row is not zero: all clips' texts must stay of one shape.
    """
    return F.pad(text, (0, 0, 0, 1)) if len(text) < TEXT_LENGTH else text


def _unconditional(text: Tensor, width: int, name: str) -> Tensor:
    """[l, D] or [1, l, D] to float32 [1, L, D]; without rows for the empty end of the 512, one is added."""
    rows = text.squeeze(0) if text.ndim == 3 else text
    if rows.ndim != 2 or rows.shape[1] != width or not 1 <= rows.shape[0] <= TEXT_LENGTH:
        wanted = f"1 to {TEXT_LENGTH} rows of the shards' width {width}"
        raise CheckpointError(f"{name} has shape {list(text.shape)}, expected {wanted}")
    if not bool(rows.isfinite().all()):
        raise CheckpointError(f"{name} holds {int((~rows.isfinite()).sum()):,} NaN or Inf; make it again")
    rows = rows.float()
    if rows.shape[0] < TEXT_LENGTH and bool(rows[-1].any()):
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
    return rows.unsqueeze(0)
