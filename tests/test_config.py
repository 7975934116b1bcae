"""A config is a citation; a wrong one costs a second and one line."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer import config
from trainer.config import Config, check_batch, differences, dump, load, to_dict
from trainer.typed import format_size, parse_size

CONFIGS = Path(config.CONFIGS)

# Karras et al. 2024 (arXiv 2312.02696), Table 6, and the reference code's presets for XXS and ImageNet-64 XS:
# channels, duration in 2^20 images, reference learning rate, decay in batches of 2,048, dropout, P_mean, P_std, image channels
PUBLISHED = {
    "edm2_xxs": (64, 2048, 0.0170, 70_000, 0.00, -0.4, 1.0, 4),
    "edm2_xs": (128, 2048, 0.0120, 70_000, 0.00, -0.4, 1.0, 4),
    "edm2_s": (192, 2048, 0.0100, 70_000, 0.00, -0.4, 1.0, 4),
    "edm2_m": (256, 2048, 0.0090, 70_000, 0.10, -0.4, 1.0, 4),
    "edm2_l": (320, 1792, 0.0080, 70_000, 0.10, -0.4, 1.0, 4),
    "edm2_xl": (384, 1280, 0.0070, 70_000, 0.10, -0.4, 1.0, 4),
    "edm2_xxl": (448, 896, 0.0065, 70_000, 0.10, -0.4, 1.0, 4),
    "edm2_img64_xs": (128, 1024, 0.0120, 35_000, 0.00, -0.8, 1.6, 3),
    "edm2_img64_s": (192, 1024, 0.0100, 35_000, 0.00, -0.8, 1.6, 3),
    "edm2_img64_m": (256, 2048, 0.0090, 35_000, 0.10, -0.8, 1.6, 3),
    "edm2_img64_l": (320, 1024, 0.0080, 35_000, 0.10, -0.8, 1.6, 3),
    "edm2_img64_xl": (384, 640, 0.0070, 35_000, 0.10, -0.8, 1.6, 3),
}


def test_every_published_preset_is_there_and_no_other():
    assert {p.stem for p in CONFIGS.glob("edm2_*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_carry_the_published_hyper_parameters(name):
    c = load(CONFIGS / f"{name}.yaml")
    channels, duration, ref_lr, decay, dropout, p_mean, p_std, image_channels = PUBLISHED[name]
    m, n, r = c.model, c.noise, c.lr
    assert (m.model_channels, m.dropout, m.channels) == (channels, dropout, image_channels)
    assert (m.channel_mult, m.num_blocks, m.attn_resolutions) == ([1, 2, 3, 4], 3, [16, 8])
    assert (m.resolution, m.label_dim, m.sigma_data, m.logvar_channels) == (64, 1000, 0.5, 128)
    assert (n.density, n.P_mean, n.P_std) == ("lognormal", p_mean, p_std)
    assert (r.ref_lr, r.decay_images, r.rampup_images) == (ref_lr, decay * 2048, 10_000_000)
    assert (c.duration_images, c.global_batch) == (duration * 2**20, 2048)
    assert (c.optimizer.beta1, c.optimizer.beta2, c.optimizer.eps) == (0.9, 0.99, 1e-8)
    assert (c.ema.sigma_rel, c.snapshots.every_images) == ([0.05, 0.10], 8 * 2**20)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_top_level_file_is_a_citation_and_survives_composition(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert all(word in text for word in ("Expect:", "Cost:", f"Run:  python cluster/submit.py configs/{path.name}"))
    c = load(path)
    assert config.from_dict(yaml.safe_load(dump(c))) == c, "a composed config reads back as itself, without Hydra"


@pytest.mark.parametrize(
    "overrides, value",
    [
        (["global_batch=1Ki", "lr.ref_lr=1e-3"], (1024, 0.001)),
        (["global_batch=512", "lr.ref_lr=0.02"], (512, 0.02)),
    ],
)
def test_overrides_win_with_human_sizes(overrides, value):
    c = load(CONFIGS / "quickstart.yaml", overrides)
    assert (c.global_batch, c.lr.ref_lr) == value


@pytest.mark.parametrize("name", ["quickstart", "edm2_s"])
def test_a_group_is_chosen_by_name(name):
    c = load(CONFIGS / f"{name}.yaml", ["engine=zero2", "cluster.nodes=2", "global_batch=4096"])
    assert (c.engine.zero_stage, c.cluster.nodes) == (2, 2)
    assert c.engine.activations == load(CONFIGS / f"{name}.yaml").engine.activations, "what the group leaves out stays"


@pytest.mark.parametrize("path", sorted((CONFIGS / "noise").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_noise_file_is_cited_loads_alone_and_in_a_preset(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "et al. 20" in " ".join(head)
    wanted = config.read_yaml(path)
    for preset in ("quickstart", "edm2_img64_s"):
        noise = to_dict(load(CONFIGS / f"{preset}.yaml", [f"noise={path.stem}"]))["noise"]
        assert {key: noise[key] for key in wanted if key not in ("curriculum", "adaptive", "learned")} == {
            key: value for key, value in wanted.items() if key not in ("curriculum", "adaptive", "learned")
        }


def test_a_config_outside_the_checkout_finds_the_groups(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [{model: edm2_xs}, {noise: edm2_img512}, _self_]\nrun: r\nduration_images: 64\n"
        "global_batch: 64\nmicro_batch: 64\ndata: {path: d}\n"
    )
    assert load(file).model.model_channels == 128


WRONG = [
    (["engine.zero_stag=1"], "did you mean engine.zero_stage?"),
    (["modle.dropout=0.1"], "did you mean model?"),
    (["ref_lr=0.1"], "did you mean lr.ref_lr?"),
    (["lr=0.1"], "set one of them: lr.ref_lr"),
    (["engine=zero9"], "configs/engine/zero9.yaml; did you mean"),
    (["global_batch=1000"], "must be a multiple of ranks x micro_batch = 2 x 128 = 256; try micro_batch=125"),
    (["duration_images=1000"], "must be a multiple of global_batch=256; try 768 or 1024"),
    (["engine.zero_stage=7"], "must be one of 0, 1, 2"),
    (["engine.activations=fp8"], "must be one of fp32, bf16, fp16"),
    (["lr.ref_lr=abc"], "'abc' is no number"),
    (["seed=1.5"], "must be a whole number"),
    (["seed=-1"], "must be at least 0"),
    (["engine.compile=2"], "must be one of auto, true, false"),
    (["engine.weights=bf16"], "use engine.zero_stage=2, or engine.weights=fp32"),
    (["engine.cuda_graphs=true", "engine.compile=false"], "set engine.cuda_graphs=false"),
    (["model.channel_mult=4"], "must be a list"),
    (["model.resolution=9"], "must be divisible by 2"),
    (["ema.sigma_rel=[0.3]"], "must lie between 0 and 0.2886"),
    (["ema.sigma_rel=[0.05,0.0501]"], "must differ in three decimals"),
    (["model.dropout=1"], "must be below 1"),
    (["--seed=1"], "must be written key=value"),
    (["+seed=1"], "must be written key=value"),
    (["seed"], "must be written key=value"),
    (["run=${seed}"], "interpolations are not supported"),
    (["seed=[1"], "not understood"),
    (["data.path=null"], "data.path: no value"),
    (["noise=laplase"], "did you mean noise=laplace?"),
    (["noise.density=laplas"], "did you mean laplace?"),
    (["noise.P_std=-1"], "noise.P_std=-1.0: must be above 0"),
    (["noise=laplace", "noise.b=0"], "noise.b=0.0: must be above 0"),
    (["noise.P_mean=inf"], "noise.P_mean=inf: must be finite"),
    (["noise.mu=nan"], "noise.mu=nan: must be finite"),
    (["noise.adaptive.strength=nan"], "noise.adaptive.strength=nan: must be finite"),
    (["model.ode.omega=inf"], "model.ode.omega=inf: must be finite"),
    (["lr.ref_lr=1e400"], "lr.ref_lr=inf: must be finite"),
    (["global_batch=inf"], "global_batch=inf: must be finite"),
    (["noise.P_mean=-100"], "levels reach below 1e-16; add noise.sigma_min=0.002"),
    (["noise=cosine", "noise.s=0.3"], "levels reach beyond 1e+16; add noise.sigma_max=80"),
    (["noise.curriculum.to={P_std: 9}", "noise.curriculum.over_images=1Mi"], "levels reach beyond 1e+16"),
    (["noise.sigma_max=1e30"], "noise.sigma_max=1e+30: must lie between 1e-16 and 1e+16"),
    (["noise.sigma_min=2", "noise.sigma_max=1"], "noise.sigma_max=1.0: must exceed noise.sigma_min=2.0"),
    (["noise.density=cauchy"], "use noise=cauchy, or add noise.sigma_min=0.002 noise.sigma_max=80"),
    (["noise=fastddpm_uniform", "noise.sigma_max=80"], "its ten levels are fixed"),
    (["noise=fastddpm_uniform", "noise.floor=0.1"], "a discrete density (fastddpm-uniform) has no broad floor"),
    (["noise=polynomial", "noise.sigma_unit=sigma_data"], "polynomial levels lie between sigma_min and sigma_max"),
    (["noise.density=polynomial", "noise.sigma_min=90"], "noise.sigma_min=90: must be below sigma_max=80"),
    (["noise=polynomial", "noise.shift=true"], "shifts the index of polynomial levels; add noise.levels=250"),
    (["noise=polynomial", "noise.levels=1"], "must be 0 (continuous) or at least 2"),
    (["noise.floor=1"], "must be below 1; try 0.05"),
    (["noise.floor=0.1", "noise.floor_sigma_min=90"], "must lie between 0 and floor_sigma_max=80.0"),
    (["noise.curriculum.over_images=1Mi"], "nothing moves"),
    (["noise.curriculum.to={P_mean: -1}"], "state in how many images the end is reached"),
    (
        ["noise.curriculum.to={b: 1}", "noise.curriculum.over_images=1Mi"],
        "lognormal moves P_mean, P_std, sigma_min, sigma_max",
    ),
    (
        ["noise.curriculum.to={P_std: 0}", "noise.curriculum.over_images=1Mi"],
        "noise.curriculum.to.P_std=0.0: must be above 0",
    ),
    (
        ["noise.curriculum.to={sigma_max: 80}", "noise.curriculum.over_images=1Mi"],
        "moves from noise.sigma_max, which is not set; add noise.sigma_max=80",
    ),
    (
        ["noise=polynomial", "noise.curriculum.to={sigma_max: 1e-3}", "noise.curriculum.over_images=1Mi"],
        "ends at sigma_max=0.001, not above sigma_min=0.002",
    ),
    (["noise.curriculum.to={P_std: wide}", "noise.curriculum.over_images=1Mi"], "'wide' is no number"),
    (["noise.curriculum.shape=cubic"], "must be one of linear, sinusoidal, high_noise"),
    (["loss.weighting=min_snr"], "the learned uncertainty divides every weight out; add loss.uncertainty=false"),
    (["loss.weighting=p2", "loss.uncertainty=false", "loss.gamma=-1"], "loss.gamma=-1.0: must be above 0"),
    (["model.prediction=eps"], "model.prediction=eps: must be one of edm, epsilon, x0, v"),
    (["model.sigma_data=0"], "model.sigma_data=0.0: must be above 0"),
]


@pytest.mark.parametrize("overrides, said", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_wrong_override_gets_one_line_with_rule_and_remedy(overrides, said):
    with pytest.raises(ValueError) as caught:
        load(CONFIGS / "quickstart.yaml", overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        ("run: [", "no valid YAML"),
        ("just words", "holds no keys"),
        ("", "holds no keys"),
        (
            "run: r\nduration_images: 1\nglobal_batch: 1\nmicro_batch: 1\ndata: {path: d}\nengine: 3\n",
            "engine: 3 is no group of keys",
        ),
        ("run: r\n", "duration_images: no value"),
        ("defaults: [{model: nope}, _self_]\nrun: r\n", "nope"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, content, said):
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        load(file)
    assert said in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_gets_the_close_names():
    with pytest.raises(ValueError, match=r"no such config file; did you mean .*configs/edm2_xl\.yaml"):
        load("configs/edm2_xll.yaml")


def test_the_login_node_imports_no_torch_and_takes_less_than_two_seconds():
    code = "import sys; from trainer.config import load; load('configs/edm2_xl.yaml', ['engine=zero2'])"
    code += "; sys.exit('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processors: a busy machine must not fail the test
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 2, "about 0.5 s"


@given(st.integers(1, 2**50))
def test_sizes_read_back_as_written(number):
    assert parse_size(format_size(number)) == number == parse_size(str(number))


@pytest.mark.parametrize(
    "text, number",
    [("8Mi", 8 * 2**20), ("143.36M", 143_360_000), ("70k", 70_000), ("1e-3", 0.001), ("2Gi", 2**31), ("1_000", 1000)],
)
def test_suffixes(text, number):
    assert float(parse_size(text)) == number


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096))
def test_a_batch_is_accepted_exactly_where_it_divides(world, micro_batch, global_batch):
    c = Config(run="r", duration_images=1, global_batch=global_batch, micro_batch=micro_batch)
    if global_batch % (world * micro_batch) == 0:
        check_batch(c, world)
    else:
        with pytest.raises(ValueError, match="try"):
            check_batch(c, world)


def test_the_digest_names_the_training_not_the_place():
    a = load(CONFIGS / "quickstart.yaml")
    moved = load(CONFIGS / "quickstart.yaml", ["run=elsewhere", "data.path=/other/place", "cluster.ranks_per_node=1"])
    other = load(CONFIGS / "quickstart.yaml", ["lr.ref_lr=0.02"])
    assert config.digest(a) == config.digest(moved) != config.digest(other)
    assert set(to_dict(a)) == {f.name for f in dataclasses.fields(Config)}


def test_differences_name_every_leaf():
    old, new = {"a": 1, "b": {"c": [1], "d": 2}, "e": 0}, {"a": 1, "b": {"c": [1, 2], "d": 2}, "f": 3}
    assert differences(old, new) == [("b.c", [1], [1, 2]), ("e", 0, None), ("f", None, 3)]


def test_a_run_started_by_hand_with_another_config_says_so_and_keeps_its_own(tmp_path, capsys):
    from trainer.train import _record

    first, path = load(config.CONFIGS / "quickstart.yaml"), tmp_path / "config.yaml"
    _record(first, path)
    _record(first, path)
    assert capsys.readouterr().err == ""
    _record(load(config.CONFIGS / "quickstart.yaml", ["lr.ref_lr=0.5"]), path)
    assert f"lr.ref_lr {first.lr.ref_lr} -> 0.5" in capsys.readouterr().err and load(path) == first


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2"}, {"RANK": "first"}, {"OMP_NUM_THREADS": "0"}, {"WORLD_SIZE": "-1"}]
)
def test_an_environment_that_no_launcher_makes_is_a_line(variables, tmp_path, monkeypatch, capsys):
    from trainer import train

    monkeypatch.delenv("MASTER_PORT", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train.main(["configs/quickstart.yaml", f"run={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {'MASTER_PORT' if 'WORLD_SIZE' in variables and '2' in variables.values() else min(variables)}"
    )
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO")
def test_a_config_that_cannot_be_read_at_present_is_no_mistake_of_the_user(tmp_path, capsys):
    from trainer import train

    (tmp_path / "config.yaml").symlink_to("/proc/self/mem")  # reading it is an I/O error
    assert train.main([str(tmp_path / "config.yaml")]) == 1, "worth another start; 2 would be the end of the run"
    assert capsys.readouterr().err.count("\n") == 1
