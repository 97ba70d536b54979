"""The loop of the distillation stages: counted in steps, on one process or under `torchrun` with FSDP2.

What is computed depends on the step, the seed and the global batch only: not on the number of processes, and not on
where a run was stopped and went on. Rounding differs a little: sharded blocks are gathered in bfloat16 whole, where one
process keeps what is no product in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoints.files import State, make_folder
from ..errors import CheckpointError
from . import checkpoint, curve, identity
from .activations import KINDS, checkpoint_activations
from .config import check_counts, check_numbers, check_pair, check_positive, check_whole, is_number
from .data import Batch, Draws, Source
from .distributed import average, from_rank_0, local, place, rank, rows_of_rank, whole
from .ema import PowerAverage

PRECISIONS = ("bf16", "float32")
AVERAGED = "student"  # the trained net whose weights are averaged


class Method(Protocol):
    """What a distillation stage is, apart from the loop.

    trained: the nets with an optimizer, in float32; sharded and saved. One of them is the "student".
    frozen: teachers; sharded, not saved. Rank 0's weights count; other processes need the shapes alone.
    """

    trained: dict[str, nn.Module]
    frozen: dict[str, nn.Module]

    def trains(self, step: int) -> str:
        """The name in `trained` of the net that this step updates."""
        ...

    def losses(self, batch: Batch, step: int, draws: Draws) -> dict[str, Tensor]:
        """Means over the batch's rows, whose sum is minimised. Random numbers come from `draws` alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every distillation stage can be told."""

    steps: int
    batch: int  # rows a step, over all processes
    accumulate: int = 1  # parts that a process's rows go through one after another
    lr: dict[str, float] = field(default_factory=dict)  # by the trained net's name
    betas: Sequence[float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 100  # updates of a net over which its rate rises linearly
    clip: float = 0.0  # largest norm of a net's gradient; 0: any
    ema: float = 0.1  # width of the student's power average as a share of the run; 0: none
    precision: str = "bf16"  # of the forward passes on a GPU: bf16 (weights and sums in float32) or float32
    activation_checkpointing: str = "none"  # none, mm_only or block
    seed: int = 0
    log_steps: int = 20  # steps in a line of the curve; the loop waits for the device only then
    save_minutes: float = 30.0

    def __post_init__(self) -> None:
        check_counts(self, ("steps", "batch", "accumulate", "log_steps"))
        check_whole(self, ("warmup", "seed"))
        check_positive(self, ("save_minutes",))
        check_numbers(self, ("weight_decay", "clip", "ema"), least=0)
        check_pair(self, "betas")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise CheckpointError(f"betas must be at least 0 and below 1, got {self.betas}")
        if not isinstance(self.lr, dict) or not all(is_number(rate) and rate >= 0 for rate in self.lr.values()):
            raise CheckpointError(
                f"lr must give a rate from 0 on for each trained net, such as {{ student = 1e-5 }}; got {self.lr!r}"
            )
        if self.activation_checkpointing not in KINDS:
            raise CheckpointError(
                f"activation_checkpointing must be one of {', '.join(KINDS)}, got '{self.activation_checkpointing}'"
            )
        if self.precision not in PRECISIONS:
            raise CheckpointError(f"precision must be one of {', '.join(PRECISIONS)}, got '{self.precision}'")
        if self.ema and not 0 < self.ema < 0.28:
            raise CheckpointError(f"ema, the average's width, must be 0 (none) or below 0.28, got {self.ema}")


@dataclass(frozen=True)
class Outcome:
    """Where a run stopped."""

    step: int
    finished: bool


def run(
    method: Method,
    source: Source,
    config: TrainerConfig,
    folder: Path,
    device: torch.device,
    max_minutes: float | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Outcome:
    """Train to the configuration's number of steps, or this run's share of them.

    Args:
        method: its nets are moved to the device and, under torchrun, sharded in place.
        folder: keeps the states, the curve and its picture; a run in the same folder goes on from the newest state.
        device: of this process.
        max_minutes: of this run, to the next line of the curve; another run in the same folder goes on.
        facts: what the run is besides its seed and batch, such as the method's settings: JSON values by name. The
            folder keeps them, and only a run of the same goes on in it.

    Raises:
        CheckpointError: the folder holds another run, or cannot be written.
        MachineError: the batch cannot be split evenly over the processes.
    """
    rows = rows_of_rank(config.batch, config.accumulate)
    make_folder(folder)
    identity.claim(folder, {"seed": config.seed, "batch": config.batch, **facts})
    trainer = Trainer(method, config, device)
    lines = folder / curve.CURVE_FILE
    states = checkpoint.saved(folder)
    if states:
        trainer.resume(states[-1])
    if rank() == 0:
        curve.cut(lines, trainer.step)
    limit = math.inf if max_minutes is None else 60 * max_minutes
    before, started, saved_at = trainer.seconds, time.monotonic(), 0.0
    window = Window()
    running = trainer.step < config.steps
    while running:
        window.add(trainer.update(source, rows))
        finished = trainer.step >= config.steps
        if not finished and trainer.step % config.log_steps:
            continue
        means = window.close()
        elapsed = from_rank_0(time.monotonic() - started, device)
        trainer.seconds = before + elapsed
        if rank() == 0:
            curve.log(lines, {"step": trainer.step, "seconds": round(trainer.seconds, 2), **means})
        running = not finished and elapsed < limit
        if not running or elapsed - saved_at >= 60 * config.save_minutes:
            checkpoint.save(folder, trainer.step, trainer.state())
            saved_at = elapsed
    if rank() == 0:
        curve.plot(curve.read(lines), folder / curve.PICTURE_FILE)
    return Outcome(trainer.step, trainer.step >= config.steps)


class Trainer:
    """A method's nets with their optimizers, and all that a state on the disk holds of them."""

    def __init__(self, method: Method, config: TrainerConfig, device: torch.device) -> None:
        if set(method.trained) != set(config.lr):
            wanted, given = (", ".join(sorted(names)) or "nothing" for names in (method.trained, config.lr))
            raise CheckpointError(f"lr needs a rate for each trained net: {wanted}; it names {given}")
        self.method, self.config, self.device = method, config, device
        self.half = config.precision == "bf16" and device.type == "cuda"
        for net in method.trained.values():
            checkpoint_activations(net.requires_grad_(True), config.activation_checkpointing)
        for net in method.frozen.values():
            net.requires_grad_(False)
        for net in (*method.trained.values(), *method.frozen.values()):
            place(net, device, self.half)
        self.parameters = {name: dict(net.named_parameters()) for name, net in method.trained.items()}
        self.optimizers = {name: self._optimizer(name) for name in method.trained}
        self.average = PowerAverage(method.trained[AVERAGED], config.ema) if config.ema else None
        self.updates = dict.fromkeys(method.trained, 0)
        self.step, self.seconds = 0, 0.0

    def _optimizer(self, name: str) -> torch.optim.AdamW:
        config, on_gpu = self.config, self.device.type == "cuda"
        parameters = list(self.parameters[name].values())
        rate, (first, second) = config.lr[name], config.betas
        optimizer = torch.optim.AdamW(
            parameters, rate, (first, second), weight_decay=config.weight_decay, fused=on_gpu
        )
        for parameter in parameters:  # made here, not in the first step: a state is read into what is there
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device if on_gpu else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def update(self, source: Source, rows: range) -> dict[str, Tensor]:
        """One step on these rows of its batch. Returns what the curve shows, on the device: losses, `norm_<net>` and
        `nonfinite` (1 where the gradient held NaN or infinity, which count as 0)."""
        name = self.method.trains(self.step)
        losses: dict[str, Tensor] = {}
        part = len(rows) // self.config.accumulate
        for start in range(rows.start, rows.stop, part):
            some = range(start, start + part)
            draws = Draws(self.config.seed, self.step, some, self.device)
            batch = source.batch(self.step, some)
            # without autocast's cache: a weight it rounded where no gradient is taken would get none later
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False):
                found = self.method.losses(batch, self.step, draws)
            shares = {key: value / self.config.accumulate for key, value in found.items()}
            sum(shares.values(), start=torch.zeros((), device=self.device)).backward()
            losses = {key: value.detach() + losses.get(key, 0) for key, value in shares.items()}
        norm, nonfinite = mend_and_clip(list(self.parameters[name].values()), self.config.clip)
        self._apply(name)
        self.step += 1
        return {**losses, f"norm_{name}": norm, "nonfinite": nonfinite}

    def _apply(self, name: str) -> None:
        """The optimizer's update of one net, and of its average."""
        warmth = min(1.0, (self.updates[name] + 1) / max(1, self.config.warmup))
        self.optimizers[name].param_groups[0]["lr"] = self.config.lr[name] * warmth
        self.optimizers[name].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if name == AVERAGED and self.average is not None:
            self.average.update(self.updates[name])
        self.updates[name] += 1

    def state(self) -> State:
        """Everything a run goes on from, by name; the nets' tensors are those in use."""
        state = {f"updates.{name}": torch.tensor(count) for name, count in self.updates.items()}
        state |= {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        for name, net in self.method.trained.items():
            state |= {f"model.{name}.{key}": value for key, value in net.state_dict().items()}
            moments = self.optimizers[name].state
            for key, parameter in self.parameters[name].items():
                state |= {f"optimizer.{name}.{key}.{what}": value for what, value in moments[parameter].items()}
        if self.average is not None:
            values = zip(self.parameters[AVERAGED], self.average.values, strict=True)
            state |= {f"average.{key}": value for key, value in values}
        return state

    def resume(self, path: Path) -> None:
        """Go on from a state on the disk."""
        state = self.state()
        checkpoint.load(path, state)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.updates = {name: int(state[f"updates.{name}"]) for name in self.updates}


class Window:
    """Means of what steps report, kept on the device until the window is closed."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0) + value.double()
            self.counts[key] = self.counts.get(key, 0) + 1

    def close(self) -> dict[str, float]:
        """The means over all steps since the last time and all processes."""
        means = average(torch.stack([self.sums[key] / self.counts[key] for key in self.sums])).tolist()
        line = dict(zip(self.sums, means, strict=True))
        self.sums.clear()
        self.counts.clear()
        return line


@torch.no_grad()
def mend_and_clip(parameters: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """Replace NaN and infinity in the gradients by 0, then scale them down to a norm.

    Args:
        limit: the largest norm; 0 for any.

    Returns:
        The norm before it was scaled, of what was not replaced (without a limit: of all, so no finite number where
        something was); and 1.0 where something was replaced, else 0.0.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    nonfinite = ~whole(norm).isfinite()
    for gradient in gradients:
        torch.nan_to_num_(local(gradient), nan=0.0, posinf=0.0, neginf=0.0)
    if limit:  # only then is it needed again: to ask whether something was replaced is to wait for the device
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return whole(norm), nonfinite.float()
