"""A stage's configuration: read whole, or one line says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbowan.errors import CheckpointError
from turbowan.train.config import SHIPPED, read_config, read_table, read_tables
from turbowan.train.flow import FlowConfig
from turbowan.train.rcm import RCMConfig
from turbowan.train.sla import SLAConfig
from turbowan.train.trainer import TrainerConfig
from turbowan.train.vae import Phase, VAEConfig
from turbowan.train.world import WorldConfig


def test_shipped_configurations_are_whole() -> None:
    vae, flow = read_config("tiny-vae", VAEConfig), read_config("tiny-flow", FlowConfig)
    assert (vae.frames, vae.height, vae.width) == (flow.frames, flow.height, flow.width) == (33, 160, 256)
    assert vae.minutes + flow.minutes <= 30  # of one H200, all stages together
    assert vae.phases[-1].until == 1.0
    assert (vae.phases[-1].height, vae.phases[-1].width) == (vae.height, vae.width)
    assert flow.dim % 128 == 0  # head size


def test_shipped_distillations_are_whole() -> None:
    methods = {"rcm": RCMConfig, "sla": SLAConfig}
    for path in SHIPPED.glob("*.toml"):
        if "[trainer]" not in path.read_text():
            continue
        method = "rcm" if "[rcm]" in path.read_text() else "sla"
        tables = read_tables(path.stem, trainer=TrainerConfig, world=WorldConfig, **{method: methods[method]})
        trained = {"student", "critic"} if method == "rcm" else {"student"}
        assert set(tables["trainer"].lr) == trained
        assert tables["world"].image == path.stem.startswith("tiny-i2v")
        assert getattr(tables[method], "boundary", None) in (None, 0.9)
        assert tables["trainer"].save_minutes == 2.5  # of minutes of training; others save twice an hour


def test_long_runs_are_not_held_up_by_their_states() -> None:
    """A state of the 14B with a critic is some 400 GB (28 bytes a weight): written twice an hour by default."""
    assert TrainerConfig(steps=1, batch=1).save_minutes == 30


def test_a_file_gives_its_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    phase = "until = 1.0\nframes = 5\nheight = 32\nwidth = 48\nbatch = 2\n"
    path.write_text(f"minutes = 2.5\nseed = 9\n[[phases]]\n{phase}")
    config = read_config(str(path), VAEConfig)
    assert (config.minutes, config.seed, config.dim) == (2.5, 9, 16)
    assert config.phases == (Phase(1.0, 5, 32, 48, 2),)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("minutes = ", "{path} is not TOML: "),
        ("minutes = 1\nlerning_rate = 2\nsede = 1", "{path} has keys this stage does not know: lerning_rate, sede"),
        ("seed = 3", "{path}: "),
        ("minutes = 1\n[[phases]]\nuntil = 1.0\nframe = 5", "{path}: "),
    ],
)
def test_bad_files(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_config(str(path), VAEConfig)
    assert str(caught.value).startswith(line.format(path=path))
    assert "\n" not in str(caught.value)


TABLES = """
[trainer]
steps = 7
batch = 3
lr = { student = 1e-4 }
betas = [0.0, 0.99]

[sla]
top_k = 0.25
blocks = [[64, 64], [128, 64]]
noise_range = [0.9, 1.0]
"""


def test_tables_fill_a_dataclass_each(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TABLES)
    found = read_tables(str(path), trainer=TrainerConfig, sla=SLAConfig, world=WorldConfig)
    assert found["trainer"] == TrainerConfig(steps=7, batch=3, lr={"student": 1e-4}, betas=[0.0, 0.99])
    assert found["sla"] == SLAConfig(top_k=0.25, blocks=[[64, 64], [128, 64]], noise_range=[0.9, 1.0])
    assert found["world"] == WorldConfig()  # a table that is missing is empty
    assert read_table(str(path), "sla", SLAConfig) == found["sla"]
    assert read_table(str(path), "world", WorldConfig) == WorldConfig()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TABLES + "[rcm]\n", "{path} takes the tables trainer, sla, world; got trainer, sla, rcm"),
        ("steps = 5\n" + TABLES, "{path} takes the tables trainer, sla, world; got steps, trainer, sla"),
        (TABLES + "top = 1\n", "{path} [sla] has keys this stage does not know: top"),
        (TABLES.replace("batch", "bach"), "{path} [trainer] has keys this stage does not know: bach"),
        (TABLES.replace("batch = 3", ""), "{path} [trainer]: "),
        (TABLES.replace("0.25", "2.5"), "{path} [sla]: sla_topk must be in (0, 1], got 2.5"),
        (TABLES + "[world]\nframes = 8\n", "{path} [world]: clips have 4 k + 1 frames"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_tables(str(path), trainer=TrainerConfig, sla=SLAConfig, world=WorldConfig)
    assert str(caught.value).startswith(line.format(path=path))
    assert "\n" not in str(caught.value)


RCM_TABLE = """
[rcm]
student_every = 5
tangent_warmup = 0
guidance_scale = 3.0
simulation_steps = 4
top_k = 0.1
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("batch = 3", "batch = 4.0", "[trainer]: batch must be a whole number, got 4.0"),
        ("batch = 3", "batch = true", "[trainer]: batch must be a positive number, got True"),
        ("batch = 3", "batch = 3\nlog_steps = 2.5", "[trainer]: log_steps must be a whole number, got 2.5"),
        ("batch = 3", "batch = 3\nwarmup = -1", "[trainer]: warmup must be a number from 0 on, got -1"),
        ("batch = 3", "batch = 3\nwarmup = 1.5", "[trainer]: warmup must be a whole number, got 1.5"),
        ("batch = 3", "batch = 3\nseed = -2", "[trainer]: seed must be a number from 0 on, got -2"),
        ("batch = 3", "batch = 3\nclip = -0.5", "[trainer]: clip must be a number from 0 on, got -0.5"),
        ("batch = 3", "batch = 3\nclip = nan", "[trainer]: clip must be a number from 0 on, got nan"),
        ("batch = 3", "batch = 3\nsave_minutes = inf", "[trainer]: save_minutes must be a positive number, got inf"),
        ("batch = 3", 'batch = 3\nema = "a"', "[trainer]: ema must be a number from 0 on, got 'a'"),
        ("{ student = 1e-4 }", "1e-5", "[trainer]: lr must give a rate from 0 on for each trained net, "),
        ("{ student = 1e-4 }", "{ student = -1 }", "[trainer]: lr must give a rate from 0 on for each trained net, "),
        ("{ student = 1e-4 }", '{ student = "a" }', "[trainer]: lr must give a rate from 0 on for each trained net, "),
        ("[0.0, 0.99]", "[0.9]", "[trainer]: betas must be two numbers, got [0.9]"),
        ("[0.0, 0.99]", '[0.9, "a"]', "[trainer]: betas must be two numbers, got [0.9, 'a']"),
        ("[0.0, 0.99]", "[0.9, 1.0]", "[trainer]: betas must be at least 0 and below 1, got [0.9, 1.0]"),
        ("[[64, 64], [128, 64]]", "[[64.0, 64]]", "[sla]: blocks must be pairs such as [[128, 64]], got [[64.0, 64]]"),
        ("[[64, 64], [128, 64]]", "64", "[sla]: blocks must be pairs such as [[128, 64]], got 64"),
        ("[0.9, 1.0]", "[0.9]", "[sla]: noise_range must be two numbers, got [0.9]"),
        ("0.25", '"a"', "[sla]: top_k must be a number, got 'a'"),
        ("0.25", "0.25\nsampler_steps = 4.0", "[sla]: sampler_steps must be a whole number, got 4.0"),
        ("student_every = 5", "student_every = 2.5", "[rcm]: student_every must be a whole number, got 2.5"),
        ("tangent_warmup = 0", "tangent_warmup = -1", "[rcm]: tangent_warmup must be a number from 0 on, got -1"),
        ("tangent_warmup = 0", "tangent_warmup = 0.5", "[rcm]: tangent_warmup must be a whole number, got 0.5"),
        ("simulation_steps = 4", "simulation_steps = 4.0", "[rcm]: simulation_steps must be a whole number, got 4.0"),
        ("guidance_scale = 3.0", 'guidance_scale = "a"', "[rcm]: guidance_scale must be a number, got 'a'"),
        ("top_k = 0.1", 'boundary = "a"', "[rcm]: boundary must be a number, got 'a'"),
        ("top_k = 0.1", "top_k = 0.1\n[world]\nframes = 33.0", "[world]: frames must be a whole number, got 33.0"),
        ("top_k = 0.1", 'top_k = 0.1\n[world]\ncamera_share = "a"', "[world]: camera_share, picture_share, their sum"),
    ],
)
def test_values_of_the_wrong_kind_are_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    """When the file is read, not when the first step needs them."""
    path, text = tmp_path / "bad.toml", TABLES + RCM_TABLE
    assert text.count(old) == 1
    kinds = {"trainer": TrainerConfig, "sla": SLAConfig, "rcm": RCMConfig, "world": WorldConfig}
    path.write_text(text)
    read_tables(str(path), **kinds)
    path.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError) as caught:
        read_tables(str(path), **kinds)
    assert str(caught.value).startswith(f"{path} {line}")
    assert "\n" not in str(caught.value)


def test_what_should_be_a_table(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("world = 5\n")
    with pytest.raises(CheckpointError, match=r"bad.toml \[world\] must be a table of settings, got 5"):
        read_table(str(path), "world", WorldConfig)


def test_missing_files_name_the_shipped_ones() -> None:
    with pytest.raises(CheckpointError, match=r"no configuration 'tiny-vea'; shipped ones: tiny-flow, .*, tiny-vae"):
        read_config("tiny-vea", VAEConfig)


@pytest.mark.parametrize("kind", ["folder", "binary"])
def test_what_is_no_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.toml"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CheckpointError) as caught:
        read_config(str(path), VAEConfig)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"minutes": 1, "batch": 0}, "batch must be a positive number, got 0"),
        ({"minutes": "x"}, "minutes must be a positive number, got 'x'"),
        ({"minutes": 1, "optimizer": "moun"}, "optimizer must be adamw or muon, got 'moun'"),
    ],
)
def test_values_that_cannot_be(values: dict, line: str) -> None:
    with pytest.raises(CheckpointError, match=line):
        FlowConfig(**values)
