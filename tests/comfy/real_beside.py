"""Other packs beside ours that have some of its keys, imported before it and after it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from real_cases import Cases
from real_graphs import node
from real_inputs import fresh_seed
from real_reference import kept
from real_server import REPOSITORY, Server

PACKS: list[Path] = []  # further ones, from the command line
STAND_IN = '''
class Node:
    CATEGORY, RETURN_TYPES, FUNCTION = "another", ("STRING",), "run"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"text": ("STRING", {})}})
    def run(self, text):
        return (text,)


KEYS = ("TurboWanModelLoader", "TurboDiffusionSaveVideo", "WanVideoSampler", "Other")
NODE_CLASS_MAPPINGS = dict.fromkeys(KEYS, Node)
'''
case = Cases()


def owners(server: Server) -> dict[str, str]:
    """The pack each key comes from."""
    modules = {key: str(each["python_module"]) for key, each in server.get("/object_info").items()}
    return {key: module.removeprefix("custom_nodes.").rpartition("-")[0] for key, module in modules.items()}


def own_latent(server: Server, seed: int) -> torch.Tensor:
    """By nodes whose keys no other pack has."""
    return kept(
        server,
        {
            "model": node("TurboWanVideoLoader", model_name="tiny"),
            "clip": node("TurboWanTextEncoderLoader", text_encoder="tiny"),
            "text": node("CLIPTextEncode", clip=["clip", 0], text="a red circle moves right on a blue background"),
            "sample": node(
                "TurboWanVideoSampler", model=["model", 0], positive=["text", 0], seed=seed, width=128, height=96,
                num_frames=9,
            ),
            "keep": node("SaveLatent", samples=["sample", 0], filename_prefix="beside"),
        },
    )  # fmt: skip


@case
def other_packs_keep_their_keys(server: Server) -> str:
    """Each alone, before ours and after ours: its nodes are all there, as they are alone (none, where it lacks a
    package); ours fill what is left and run as ever. The log names the keys that were taken before."""
    seed, lines = fresh_seed(), []
    mine = {key for key, owner in owners(server).items() if owner == REPOSITORY.name}
    wanted = own_latent(server, seed)
    with TemporaryDirectory(prefix="turbowan-pack-") as folder:
        stand_in = Path(folder) / "stand-in"
        stand_in.mkdir()
        (stand_in / "__init__.py").write_text(STAND_IN)
        for pack in (stand_in, *PACKS):
            alone, before, after = (pack,), (pack, REPOSITORY), (REPOSITORY, pack)
            found: dict[str, set[str]] = {}
            for name, packs in {"alone": alone, "before": before, "after": after}.items():
                with Server(server.comfy, server.python, server.flags, device=server.device, packs=packs) as other:
                    all_owners = owners(other)
                    found[name] = {key for key, owner in all_owners.items() if owner == pack.name}
                    if name == "alone":
                        continue
                    assert found[name] == found["alone"], f"{pack.name} {name} ours: {found[name] ^ found['alone']}"
                    left = {key for key, owner in all_owners.items() if owner == REPOSITORY.name}
                    assert left == mine - found[name], f"{pack.name} {name} ours: {left ^ (mine - found[name])}"
                    log = other.log.read_text()
                    shared = sorted(mine & found[name])
                    told = all(key in line for line in log.splitlines() if "had" in line for key in shared)
                    assert name == "after" or not shared or (f"{pack.name}-" in log and told), log[-2000:]
                    assert torch.equal(own_latent(other, seed), wanted), f"{pack.name} {name} ours changes a latent"
            lines.append(f"{pack.name}: {len(found['alone'])} nodes, {len(mine & found['alone'])} of them also ours")
            print(f"    {lines[-1]}", flush=True)
    return "; ".join(lines)
