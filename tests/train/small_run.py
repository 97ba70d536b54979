"""A small distillation with all that the real ones do, for tests: in this process, or as a script under torchrun, which
makes one run after another where the word "then" stands between their arguments.

Student and critic take turns. A step of the student takes a forward-mode tangent without gradients, then goes through
the student twice with them. Whatever depends on a sample depends on that sample alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from itertools import groupby
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
from turbowan.train import distributed, trainer
from turbowan.train.data import Batch, Draws

SIZES = TransformerConfig(dim=128, ffn_dim=192, num_layers=2, text_dim=24, freq_dim=64, has_sla=True)


class Latents:
    """Row r of step s is always the same."""

    negative = torch.zeros(1, 3, SIZES.text_dim)

    def batch(self, step: int, rows: range) -> Batch:
        draws = Draws(99, step, rows, torch.device("cpu"))
        return Batch(draws.normal(16, 2, 6, 8), draws.normal(3, SIZES.text_dim))


class Small:
    """The method: a student that follows a teacher, and a critic that follows the student."""

    def __init__(self, seed: int, kill_at: int = -1, sizes: TransformerConfig = SIZES) -> None:
        def net(number: int) -> WanTransformer:
            torch.manual_seed(seed + number)
            return WanTransformer(sizes, AttentionConfig("sla", top_k=0.5, block_q=8, block_k=8))

        self.student, self.critic, self.teacher = net(0), net(1), net(2)
        self.trained = {"student": self.student, "critic": self.critic}
        self.frozen = {"teacher": self.teacher}
        self.kill_at = kill_at

    def trains(self, step: int) -> str:
        return "critic" if step % 3 == 2 else "student"

    def losses(self, batch: Batch, step: int, draws: Draws) -> dict[str, Tensor]:
        noise, time = draws.normal(*batch.latents.shape[1:]), draws.uniform()
        weight = time.view(-1, 1, 1, 1, 1)
        x, t = (1 - weight) * batch.latents + weight * noise, 1000 * time
        if self.trains(step) == "critic":
            with torch.no_grad():
                made = self.student(x, t, batch.text)
            return {"critic": (self.critic(made, t, batch.text) - batch.latents).square().mean()}
        with torch.no_grad():
            wanted = self.teacher(x, t, batch.text)
            with forward_ad.dual_level():
                dual = self.student(forward_ad.make_dual(x, noise), forward_ad.make_dual(t, t), batch.text)
                tangent = forward_ad.unpack_dual(dual).tangent
            tangent = tangent / (1 + tangent.flatten(1).norm(dim=1).view_as(weight))
        if step == self.kill_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out = self.student(x, t, batch.text)
        twice = self.student(x - out, 0.5 * t, batch.text)
        return {"tangent": (out - wanted - tangent).square().mean(), "twice": 0.1 * (twice - wanted).square().mean()}


def main(arguments: list[str]) -> trainer.Outcome:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activations", default="none")
    parser.add_argument("--log-steps", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=60.0)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--kill-at", type=int, default=-1, help="a step in which process 1 kills itself")
    given = parser.parse_args(arguments)
    config = trainer.TrainerConfig(
        steps=given.steps, batch=given.batch, accumulate=given.accumulate, lr={"student": 3e-3, "critic": 1e-3},
        warmup=4, clip=0.5, activation_checkpointing=given.activations, seed=given.seed, log_steps=given.log_steps,
        save_minutes=given.save_minutes,
    )  # fmt: skip
    device = distributed.join(torch.device("cpu"))
    return trainer.run(Small(given.seed, given.kill_at), Latents(), config, given.folder, device, given.max_minutes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for between, arguments in groupby(sys.argv[1:], "then".__eq__):
        if not between:
            main(list(arguments))
    distributed.leave()
