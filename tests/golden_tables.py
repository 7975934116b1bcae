"""Golden checks of what needs no training: power-function averages, samplers, schedules, latents."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from data_pipeline import latents
from data_pipeline.manifest import RGB_MEAN, RGB_STD, SD_VAE_MEAN, SD_VAE_STD, Manifest
from models import magnitude, sampler
from tests.golden import OUTPUT, SAMPLER, TABLE, TRAINED, Report, Vectors, network
from trainer import ema_profiles, frechet
from trainer.ema import ShardedEma
from trainer.lr import learning_rate

COEFFICIENTS = 1e-9  # absolute; INDEX.json: the systems have condition numbers up to 2e6


def relative(got: float, want: float) -> float:
    """Return |got - want| / |want|, or |got - want| where the wanted value is 0."""
    return abs(got - want) / abs(want) if want else abs(got - want)


# ---------------------------------------------------------------------------------------------------------------------
# gd: averages


def averages(file: Vectors, report: Report) -> None:
    """Compare exponents, decay factors, coefficients and a toy trajectory's averages and reconstructions."""
    facts = file.facts
    gamma, sigma = ema_profiles.gamma_from_sigma_rel, ema_profiles.sigma_rel_from_gamma
    errors = {f"{row['std']}": relative(gamma(row["std"]), row["exp"]) for row in facts["std_to_exp"]}
    report.worst(file.name, "std_to_exp", errors, TABLE)
    errors = {f"{row['std']}": relative(sigma(row["exp"]), row["std_back"]) for row in facts["std_to_exp"]}
    report.worst(file.name, "std_back", errors, TABLE)
    errors = {f"{row['exp']}": relative(sigma(row["exp"]), row["std"]) for row in facts["exp_to_std"]}
    report.worst(file.name, "exp_to_std", errors, TABLE)
    errors = {
        f"{row['std']} at {row['t_next']}": relative(
            ema_profiles.beta(row["t_next"], row["t_delta"], gamma(row["std"])), row["beta"]
        )
        for row in facts["betas"]
    }
    report.worst(file.name, "betas", errors, TABLE)
    errors = {
        str(index): relative(
            float(ema_profiles.correlation(r["a_ofs"], gamma(r["a_std"]), r["b_ofs"], gamma(r["b_std"]))), r["value"]
        )
        for index, r in enumerate(facts["correlations"])
    }
    report.worst(file.name, "correlations", errors, TABLE)
    for solution in facts["solutions"]:
        got = coefficients(solution["in_nimg"], solution["in_std"], solution["out_nimg"], solution["out_std"])
        error = np.abs(got - np.array(solution["coefs"])).max()
        report.check(file.name, f"coefficients (absolute): {solution['name']}", float(error), COEFFICIENTS)
    _toy(file, report)
    report.apart(file.name, "response", "samples of one profile, for plotting; this program works with its integrals")


def coefficients(in_nimg: list, in_std: list, out_nimg: int, out_std: list) -> np.ndarray:
    """Return the coefficients [inputs, outputs] of a reconstruction."""
    gammas = [[ema_profiles.gamma_from_sigma_rel(std) for std in stds] for stds in (in_std, out_std)]
    return ema_profiles.solve_weights(in_nimg, gammas[0], out_nimg, gammas[1])


def _toy(file: Vectors, report: Report) -> None:
    toy, path = file.facts["toy"], file["toy.trajectory"]
    tracked, targets = toy["tracked_stds"], toy["target_stds"]
    fragment = SimpleNamespace(master=torch.zeros(path.shape[1]))
    ema = ShardedEma([fragment], [*tracked, *targets])
    snapshots = []
    for step, weights in enumerate(path, start=1):
        fragment.master.copy_(weights)
        ema.update(step * toy["batch"], toy["batch"])
        if step % toy["snapshot_every_steps"] == 0:
            snapshots += [ema.averages[index][0].clone() for index in range(len(tracked))]
    made = torch.stack(snapshots)
    truth = torch.stack([ema.averages[len(tracked) + index][0] for index in range(len(targets))])
    report.close(file.name, "toy: tracked averages", made, file["toy.snapshots"], TRAINED)
    report.close(file.name, "toy: averages of the targets", truth, file["toy.true_ema"], TRAINED)
    found = coefficients(toy["snapshot_nimg"], toy["snapshot_std"], toy["target_nimg"], targets)
    error = np.abs(found - file["toy.coefs"].numpy()).max()
    report.check(file.name, "toy: coefficients (absolute)", float(error), COEFFICIENTS)
    weights = torch.from_numpy(found.T)
    stored = file["toy.snapshots"]
    whole, half = weights @ stored.double(), weights @ stored.half().double()
    report.close(file.name, "toy: reconstructed", whole, file["toy.reconstructed"], TRAINED)
    name = "toy.reconstructed_from_fp16_snapshots"
    report.close(file.name, "toy: reconstructed from fp16", half, file[name], TRAINED)
    for key, value in (("max_abs_error_reconstruction", whole), ("max_abs_error_fp16", half)):
        error = (value - file["toy.true_ema"].double()).abs().max().item()
        report.check(file.name, f"toy: {key}", relative(error, toy[key]), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# ge: the sampler


def _loaded(config: dict, seed: int):
    net = network(config, seed).eval().requires_grad_(False)
    magnitude.use_weights_(net)
    return net


@torch.no_grad()
def sampling(file: Vectors, report: Report) -> None:
    """Compare Heun's method with and without guidance, in float64, with churn, and inside guidance intervals."""
    facts, labels = file.facts, file.tensors.get("class_labels")
    net, weak = (
        _loaded(facts["config"], facts["weights_seed"]),
        _loaded(facts["gnet_config"], facts["gnet_weights_seed"]),
    )
    sigmas = sampler.edm_grid(facts["sampler"]["num_steps"])
    start = file["noise"] * float(sigmas[0])
    calls: list[tuple[float, Tensor]] = []

    def main(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((float(sigma[0]), x))
        return net(x, sigma, labels)

    def guide(x: Tensor, sigma: Tensor) -> Tensor:
        return weak(x, sigma, labels)

    report.close(file.name, "heun", sampler.heun(main, start, sigmas), file["heun"], SAMPLER)
    report.equal(file.name, "number of evaluations", len(calls), facts["nfe"])
    levels = [sigma for sigma, _ in calls]
    errors = {str(i): relative(got, want) for i, (got, want) in enumerate(zip(levels, file["heun.t_eval"].tolist()))}
    report.worst(file.name, "heun.t_eval (the reference's grid is fp32)", errors, OUTPUT)
    first = torch.stack([x for _, x in calls[::2]])
    report.close(file.name, "heun.x_first_eval_of_step", first, file["heun.x_first_eval_of_step"], SAMPLER)
    got = sampler.heun(main, start.double(), sigmas)
    report.close(file.name, "heun_float64", got, file["heun_float64"], SAMPLER)

    weight = facts["guidance"]
    got = sampler.heun(sampler.guidance(main, guide, weight), start, sigmas)
    report.close(file.name, "heun_guided", got, file["heun_guided"], SAMPLER)
    below = float(re.search(r"guidance ([\d.]+)", facts["tensors"]["heun_selfguided_below1"]["about"])[1])
    got = sampler.heun(sampler.guidance(main, guide, below), start, sigmas)
    report.close(file.name, "heun_selfguided_below1", got, file["heun_selfguided_below1"], SAMPLER)

    churn, draws = facts["churn"], iter(range(facts["num_churn_draws"]))
    got = sampler.heun(
        main,
        start,
        sigmas,
        churn=churn["S_churn"],
        churn_min=churn["S_min"],
        churn_max=churn["S_max"],
        churn_noise=churn["S_noise"],
        normal=lambda step: file[f"churn_draw{next(draws)}"],
    )
    report.close(file.name, "heun_churn", got, file["heun_churn"], SAMPLER)
    _intervals(file, report, main, guide, start, sigmas)
    rgb = latents.decode(file["heun"][:, :3] * 0.5, _pixels(file["heun"].shape[-1]))
    report.equal(file.name, "rgb_uint8", torch.equal(rgb, file["rgb_uint8"]), True)
    report.apart(
        file.name,
        "seeded_noise_first8, seeded_labels",
        "draws of torch generators; this program's draws are functions of (seed, stream, position) in trainer/draws.py",
    )


def _intervals(file: Vectors, report: Report, main, guide, start: Tensor, sigmas: Tensor) -> None:
    interval, weight = file.facts["guidance_interval"], file.facts["guidance"]
    guided = sampler.guidance(main, guide, weight, (interval["sigma_lo"], interval["sigma_hi"]))
    name = "heun_guidance_interval_sigma"
    report.close(file.name, name, sampler.heun(guided, start, sigmas), file[name], SAMPLER)
    everywhere = sampler.guidance(main, guide, weight)
    first, last = interval["first_step"], interval["last_step"] + 1
    x = sampler.heun(main, start, sigmas[: first + 1])
    x = sampler.heun(everywhere, x, sigmas[first : last + 1])
    x = sampler.heun(main, x, sigmas[last:])
    name = "heun_guidance_interval_steps"
    report.close(file.name, name, x, file[name], SAMPLER)


# ---------------------------------------------------------------------------------------------------------------------
# gf: schedules and data


def _pixels(resolution: int) -> Manifest:
    return _manifest("pixels", "mean", (3, resolution, resolution), RGB_MEAN, RGB_STD)


def _manifest(codec: str, moments: str, shape: tuple, mean: tuple, std: tuple) -> Manifest:
    return Manifest(
        container="webdataset",
        codec=codec,
        codec_hash="",
        moments=moments,
        dtype="float32",
        shape=shape,
        label_dim=0,
        class_counts=(),
        mean=mean,
        std=std,
        whitening="published",
        shards=(),
    )


def schedules(file: Vectors, report: Report) -> None:
    """Compare learning rates, latents and pixels; name what is not ours on purpose."""
    errors = {}
    for row in file.facts["lr_table"]:
        ref_lr, batches = (float(v) for v in re.search(r"([\d.]+)(?: decay |/)(\d+)", row["preset"]).groups())
        got = learning_rate(row["nimg"], ref_lr, batches * row["batch"], 10e6)
        errors[f"{row['preset']} at {row['nimg']}"] = relative(got, row["lr"])
    report.worst(file.name, "lr_table", errors, TABLE)
    errors = {
        str(index): relative(
            learning_rate(row["nimg"], row["ref_lr"], row["ref_batches"] * row["batch"], row["rampup_Mimg"] * 1e6),
            row["lr"],
        )
        for index, row in enumerate(file.facts["lr_odd"])
    }
    report.worst(file.name, "lr_odd", errors, TABLE)

    raw, pixels = file["raw_latents"], file["pixels"]
    vae = _manifest("sd-vae-ft-mse", "mean_std", tuple(raw.shape[1:]), SD_VAE_MEAN, SD_VAE_STD)
    scale = torch.tensor([latents.SIGMA_DATA / std for std in SD_VAE_STD])
    report.close(file.name, "vae_scale", scale, file["vae_scale"], OUTPUT)
    report.close(file.name, "vae_bias", -torch.tensor(SD_VAE_MEAN) * scale, file["vae_bias"], OUTPUT)
    report.close(file.name, "latents", latents.whiten(raw, vae, file["latent_eps"]), file["latents"], OUTPUT)
    rgb = _pixels(pixels.shape[-1])
    encoded = latents.whiten(pixels, rgb)
    report.close(file.name, "pixels_encoded", encoded, file["pixels_encoded"], OUTPUT)
    same = torch.equal(latents.decode(file["pixels_encoded"], rgb), file["rgb_roundtrip"])
    report.equal(file.name, "rgb_roundtrip", same, True)
    report.apart(
        file.name,
        "infinite_sampler",
        "the order of samples is data_pipeline/order.py's: elastic and windowed over shards",
    )
    report.apart(
        file.name, "step_seeds", "no generator is seeded per step; draws are functions of (seed, stream, position)"
    )
    moments = []
    for name in ("feat_a", "feat_b"):
        statistics = frechet.Statistics("golden", file[name].shape[1])
        for part in file[name].numpy().reshape(10, -1, file[name].shape[1]):
            statistics.add(part)  # in parts, as images come
        moments.append(statistics.moments())
    (mean, covariance), other = moments
    report.close(file.name, "mu_a", torch.from_numpy(mean), file["mu_a"], TABLE)
    report.close(file.name, "sigma_a", torch.from_numpy(covariance), file["sigma_a"], TABLE)
    value = file.facts["frechet"]["value"]
    distance = torch.tensor(frechet.distance(mean, covariance, *other), dtype=torch.float64)
    report.close(file.name, "frechet", distance, torch.tensor(value, dtype=torch.float64), TABLE)
