"""Downloads from a hub on the loopback: sizes, resuming, checksums, disk space, errors, manifests."""

from __future__ import annotations

import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from turbowan.checkpoints import hub
from turbowan.checkpoints.manifest import read_manifest
from turbowan.checkpoints.published import PUBLISHED, Published
from turbowan.errors import CheckpointError, MachineError
from turbowan.specs import FAMILIES

TURBO = "turbowan2.1-t2v-1.3b-480p"
TOKENIZER = PUBLISHED["umt5-xxl-tokenizer"]
SPIECE = "google/umt5-xxl/spiece.model"
SHARDED = "diffusion_pytorch_model-0000{}-of-00002.safetensors"


def fill(loopback: Any, model: Published, **sizes: int) -> None:
    """Random files for every part of a model, and a file that belongs to none; sizes: bytes by role."""
    for part in (*model.parts.values(), *model.quant.values()):
        loopback.repos.setdefault(part.repo, {"README.md": os.urandom(70)})
    for role, part in [*model.parts.items(), *model.quant.items()]:
        files = loopback.repos[part.repo]
        content = os.urandom(sizes.get(role, 5000))
        if role == "tokenizer":
            files[part.path + "spiece.model"] = content
            files[part.path + "tokenizer_config.json"] = os.urandom(300)  # small: listed with git's checksum only
        elif part.path.endswith("/"):
            files[part.path + "model.safetensors"] = content
        else:
            files[part.path] = content
        if part.shards:
            files.update({SHARDED.format(i): os.urandom(2000) for i in (1, 2)})


def download(model: Published, folder: Path, quant: bool = False) -> list[hub.Item]:
    """All steps in the command's order; gives what was found at the start."""
    hub.check_folder(model, quant, folder)
    files = hub.list_files(model, quant)
    with hub.exclusive(folder):
        items = hub.look(files, folder)
        hub.check_space(items, folder)
        hub.fetch(items)
        hub.write_model_manifest(model, quant, folder)
    return items


def partials(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".*.part"))


@pytest.mark.parametrize(
    ("name", "quant"), [(n, q) for n, m in PUBLISHED.items() for q in (False, True) if m.quant or not q]
)
def test_every_model_arrives_whole_with_its_manifest(loopback_hub, tmp_path, name, quant) -> None:
    model = PUBLISHED[name]
    fill(loopback_hub, model)
    folder = tmp_path / "deep" / name
    items = download(model, folder, quant)
    for item in items:
        assert item.missing == item.file.size == len(loopback_hub.repos[item.file.repo][item.file.path])
        assert (folder / item.file.path).read_bytes() == loopback_hub.repos[item.file.repo][item.file.path]
    assert not partials(folder)
    assert not (folder / "README.md").exists()
    int8 = {part.path for part in model.quant.values()} if quant else set()
    assert {path.name for path in folder.rglob("*-quant.pth")} == int8
    if model.family is None:
        assert not (folder / "turbowan.toml").exists()
        return
    manifest = read_manifest(folder)
    defaults = FAMILIES[model.family]
    assert manifest.family == model.family
    assert manifest.name == name + ("-quant" if quant else "")
    assert (manifest.sampler, manifest.num_steps) == (defaults.sampler, defaults.num_steps)
    assert manifest.sigma_max == defaults.sigma_max
    for key, value in model.settings.items():
        assert getattr(manifest, key) == value
    assert manifest.distilled == name.startswith("turbo")
    assert set(manifest.files) == set(model.parts)
    assert all(path.exists() for path in manifest.files.values())


def test_the_second_run_fetches_nothing_and_mends_what_is_damaged(loopback_hub, tmp_path) -> None:
    model = PUBLISHED[TURBO]
    fill(loopback_hub, model)
    download(model, tmp_path)
    manifest = tmp_path / "turbowan.toml"
    manifest.write_text(manifest.read_text().replace("fps = 16", "fps = 24"))  # a user's own setting
    loopback_hub.requests.clear()
    assert all(item.whole for item in download(model, tmp_path))
    assert all(path.startswith("/api/") for _, path, _ in loopback_hub.requests)
    assert read_manifest(tmp_path).fps == 24

    damaged = bytearray((tmp_path / SPIECE).read_bytes())
    damaged[77] ^= 1  # same size, other content
    (tmp_path / SPIECE).write_bytes(damaged)
    loopback_hub.requests.clear()
    download(model, tmp_path)
    assert (tmp_path / SPIECE).read_bytes() == loopback_hub.repos[TOKENIZER.repo][SPIECE]
    assert {path for method, path, _ in loopback_hub.requests if path.startswith("/store/")} == {f"/store/{SPIECE}"}


def test_a_folder_holds_one_model(loopback_hub, tmp_path) -> None:
    model = PUBLISHED[TURBO]
    fill(loopback_hub, model)
    download(model, tmp_path)
    before = (tmp_path / "turbowan.toml").read_bytes()
    for other, quant in ((model, True), (PUBLISHED["wan2.1-t2v-1.3b"], False)):
        with pytest.raises(
            CheckpointError, match=r"turbowan.toml names other files than .*; choose another folder with -o"
        ):
            download(other, tmp_path, quant)
    download(TOKENIZER, tmp_path)  # no model of its own
    assert (tmp_path / "turbowan.toml").read_bytes() == before
    (tmp_path / "turbowan.toml").write_bytes(before[:-9])
    with pytest.raises(CheckpointError, match="is not a readable manifest"):
        download(model, tmp_path)


def test_a_cut_connection_is_gone_on_with(loopback_hub, tmp_path) -> None:
    fill(loopback_hub, TOKENIZER, tokenizer=1_000_000)
    loopback_hub.cut[SPIECE] = deque([300_000])
    download(TOKENIZER, tmp_path)
    assert (tmp_path / SPIECE).read_bytes() == loopback_hub.repos[TOKENIZER.repo][SPIECE]
    first, second = loopback_hub.gets(SPIECE)
    assert "Range" not in first
    start = int(second["Range"].removeprefix("bytes=").split("-")[0])
    assert 300_000 - (1 << 16) <= start <= 300_000


def test_a_later_run_goes_on_where_the_first_one_stopped(loopback_hub, tmp_path) -> None:
    fill(loopback_hub, TOKENIZER, tokenizer=1_000_000)
    loopback_hub.cut[SPIECE] = deque([400_000, *[0] * 20])  # then the network stays away
    with pytest.raises(MachineError, match="run the command again to go on where it stopped"):
        download(TOKENIZER, tmp_path)
    (partial,) = partials(tmp_path)
    have = partial.stat().st_size
    assert 400_000 - (1 << 16) <= have <= 400_000
    assert not (tmp_path / SPIECE).exists()

    loopback_hub.cut.clear()
    loopback_hub.requests.clear()
    (item, _) = download(TOKENIZER, tmp_path)
    assert item.missing == 1_000_000 - have
    assert [headers["Range"] for headers in loopback_hub.gets(SPIECE)] == [f"bytes={have}-"]
    assert (tmp_path / SPIECE).read_bytes() == loopback_hub.repos[TOKENIZER.repo][SPIECE]
    assert not partials(tmp_path)


def test_a_partial_file_of_another_revision_is_not_gone_on_with(loopback_hub, tmp_path) -> None:
    fill(loopback_hub, TOKENIZER, tokenizer=600_000)
    (now, _) = hub.look(hub.list_files(TOKENIZER, False), tmp_path)
    fill(loopback_hub, TOKENIZER, tokenizer=600_000)
    now.partial.parent.mkdir(parents=True)
    now.partial.write_bytes(os.urandom(200_000))
    (item, _) = download(TOKENIZER, tmp_path)
    assert item.missing == 600_000
    assert ["Range" in headers for headers in loopback_hub.gets(SPIECE)] == [False]
    assert (tmp_path / SPIECE).read_bytes() == loopback_hub.repos[TOKENIZER.repo][SPIECE]
    assert not partials(tmp_path)


@pytest.mark.parametrize("path", [SPIECE, "google/umt5-xxl/tokenizer_config.json"])
def test_a_wrong_checksum_removes_the_file(loopback_hub, tmp_path, path) -> None:
    fill(loopback_hub, TOKENIZER)
    loopback_hub.served[path] = os.urandom(len(loopback_hub.repos[TOKENIZER.repo][path]))
    with pytest.raises(CheckpointError, match=rf"{path} came damaged: its (sha256|git) checksum is \w+…") as caught:
        download(TOKENIZER, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / path).exists()
    assert not partials(tmp_path)
    loopback_hub.served.clear()
    download(TOKENIZER, tmp_path)
    assert (tmp_path / path).read_bytes() == loopback_hub.repos[TOKENIZER.repo][path]


def test_no_disk_space_is_said_before_anything_is_fetched(loopback_hub, tmp_path, monkeypatch) -> None:
    fill(loopback_hub, TOKENIZER, tokenizer=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 8_500_000, 1_500_000))
    with pytest.raises(MachineError, match=r"has 1.5 MB free, but 2.0 MB are still to come"):
        download(TOKENIZER, tmp_path)
    assert not loopback_hub.gets(SPIECE)
    part = hub.look(hub.list_files(TOKENIZER, False), tmp_path)[0].partial
    part.parent.mkdir(parents=True)
    part.write_bytes(loopback_hub.repos[TOKENIZER.repo][SPIECE][:600_000])  # with this much there, the rest fits
    download(TOKENIZER, tmp_path)


def test_the_same_file_beside_is_linked_not_fetched(loopback_hub, tmp_path) -> None:
    first, second = PUBLISHED[TURBO], PUBLISHED["turbowan2.1-t2v-14b-480p"]
    fill(loopback_hub, first)
    download(first, tmp_path / "first")
    shared = dict(loopback_hub.repos[TOKENIZER.repo])
    fill(loopback_hub, second)
    loopback_hub.repos[TOKENIZER.repo] = {**loopback_hub.repos[TOKENIZER.repo], **shared}
    loopback_hub.requests.clear()
    items = download(second, tmp_path / "second")
    assert [item.copy is not None for item in items] == [False, True, True, True, True]
    fetched = {path for _, path, _ in loopback_hub.requests if "/resolve/" in path}
    assert {path.rpartition("/")[2] for path in fetched} == {"TurboWan2.1-T2V-14B-480P.pth"}
    vae = tmp_path / "second" / "Wan2.1_VAE.pth"
    assert vae.read_bytes() == shared["Wan2.1_VAE.pth"]
    assert vae.stat().st_ino == (tmp_path / "first" / "Wan2.1_VAE.pth").stat().st_ino


def test_the_token_goes_to_the_hub_alone(loopback_hub, tmp_path, monkeypatch) -> None:
    fill(loopback_hub, TOKENIZER)
    download(TOKENIZER, tmp_path / "without")
    assert all("Authorization" not in headers for _, _, headers in loopback_hub.requests)
    loopback_hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    shutil.rmtree(tmp_path / "without")
    download(TOKENIZER, tmp_path / "with")
    for _, path, headers in loopback_hub.requests:
        wanted = None if path.startswith("/store/") else "Bearer hf_" + "a" * 20
        assert {key.lower(): value for key, value in headers.items()}.get("authorization") == wanted, path


@pytest.mark.parametrize(
    ("where", "answer", "error", "line"),
    [
        (TOKENIZER.repo, (404, "RepoNotFound"), CheckpointError, "is not at http://127.0.0.1"),
        (TOKENIZER.repo, (401, "RepoNotFound"), CheckpointError, "or is private: then set HF_TOKEN"),
        (TOKENIZER.repo, (403, "GatedRepo"), CheckpointError, "is gated: accept its terms"),
        (SPIECE, (403, "GatedRepo"), CheckpointError, "is gated: accept its terms"),
        (SPIECE, (401, ""), (MachineError, CheckpointError), "HF_TOKEN"),
        (SPIECE, (404, "EntryNotFound"), CheckpointError, "is no longer at"),
        (SPIECE, (500, ""), MachineError, "500"),
    ],
)
def test_refusals_are_one_line(loopback_hub, tmp_path, where, answer, error, line) -> None:
    fill(loopback_hub, TOKENIZER)
    loopback_hub.status[where] = answer
    with pytest.raises(error, match=line) as caught:
        download(TOKENIZER, tmp_path)
    assert "\n" not in str(caught.value)
    assert TOKENIZER.repo in str(caught.value)
    assert not (tmp_path / SPIECE).exists()


def test_a_file_the_repository_lacks(loopback_hub, tmp_path) -> None:
    model = PUBLISHED[TURBO]
    fill(loopback_hub, model)
    del loopback_hub.repos[model.repo]["TurboWan2.1-T2V-1.3B-480P-quant.pth"]
    with pytest.raises(CheckpointError, match=r"holds no TurboWan2.1-T2V-1.3B-480P-quant.pth \(the transformer\)"):
        hub.list_files(model, quant=True)
    assert len(hub.list_files(model, quant=False)) == 5


def test_a_listing_that_points_out_of_the_folder_is_refused(loopback_hub, tmp_path) -> None:
    fill(loopback_hub, TOKENIZER)
    loopback_hub.repos[TOKENIZER.repo]["google/umt5-xxl/../../../evil"] = os.urandom(2000)
    with pytest.raises(CheckpointError, match="outside its folder"):
        download(TOKENIZER, tmp_path / "in")
    assert not (tmp_path / "evil").exists()


def test_no_connection(loopback_hub, tmp_path, monkeypatch) -> None:
    loopback_hub.close()
    with pytest.raises(MachineError, match=rf"no connection to {loopback_hub.url} for {TOKENIZER.repo} \(") as caught:
        hub.list_files(TOKENIZER, False)
    assert "\n" not in str(caught.value)


def test_offline_mode(loopback_hub, monkeypatch) -> None:
    fill(loopback_hub, TOKENIZER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import _http

    for name in ("close_session", "reset_sessions"):  # the session keeps the mode it was made in
        getattr(_http, name, lambda: None)()
    try:
        with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
            hub.list_files(TOKENIZER, False)
    finally:
        monkeypatch.undo()
        for name in ("close_session", "reset_sessions"):
            getattr(_http, name, lambda: None)()


def test_a_file_where_the_folder_should_be(tmp_path) -> None:
    (tmp_path / "file").touch()
    line = r"file cannot be written \(File exists\); choose another with -o"
    with pytest.raises(MachineError, match=line), hub.exclusive(tmp_path / "file"):
        pass
