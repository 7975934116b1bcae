"""The groups of a config: one dataclass each, every key with its type, its default and what it may be.

The words are the papers'. A key that is not here does not exist: configs/ and the command line can only set what this file names.
Checks that span keys are in trainer/config.py.
"""

from dataclasses import dataclass, field

from trainer.typed import at_least, list_of, one_of, required


@dataclass
class Ode:
    """The blocks of a U-Node (models/unode.py, unode_paper.py); means nothing to the other families."""

    mode: str = one_of("mp", "mp", "paper", "released")  # mp: magnitude-preserving, in EDM2's macro-architecture
    # split: magnitude-preserving, mode mp; fixed steps up to rk4; the others adaptive: they run a different number of steps on
    # every rank, and an image then depends on its batch
    solver: str = one_of("split", "split", "euler", "midpoint", "rk4", "dopri5", "bosh3", "adaptive_heun")
    steps: int = at_least(2, 1)  # over [0, 1], fixed-step solvers
    adjoint: bool = False  # gradient by the adjoint equation: memory independent of the steps, not exact
    rtol: float = at_least(1e-3, 0.0)  # adaptive solvers and the adjoint
    atol: float = at_least(1e-3, 0.0)
    omega: float = (
        1.5708  # mp: angle by which position and velocity turn into each other over a block; pi / 2 exchanges them
    )
    strength: float = at_least(
        2.0, 0.0
    )  # mp: of the force, over a block; 2 and 4 were equal on digits, 1 worse (docs/LOG.md)
    hidden: float = at_least(1.0, 0.0)  # mp: channels inside the force, relative to the block's; rounded to fours
    norm: str = one_of("group", "group", "instance")  # released: of the authors' final experiments, or of their code


@dataclass
class Model:
    """The network; names follow the EDM2 paper (Karras et al. 2024, Table 6 and Appendix A).

    Which keys mean something to which family: trainer/model_keys.py.
    """

    family: str = one_of("edm2", "edm2", "unode", "ddpm_unet")
    resolution: int = at_least(64, 1)  # height and width of what is diffused: latents or pixels
    channels: int = at_least(4, 1)
    label_dim: int = at_least(1000, 0)  # 0: unconditional
    model_channels: int = at_least(192, 1)
    channel_mult: list[int] = list_of(1, 2, 3, 4)
    num_blocks: int = at_least(3, 1)
    attn_resolutions: list[int] = list_of(16, 8)
    channels_per_head: int = at_least(64, 1)
    channel_mult_noise: int = at_least(0, 0)  # 0: the first level's width
    channel_mult_emb: int = at_least(0, 0)  # 0: the widest level's width
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0  # 0: off
    dropout: float = at_least(0.0, 0.0)
    resample_filter: list[int] = list_of(1, 1)
    logvar_channels: int = at_least(128, 1)
    sigma_data: float = 0.5
    ode: Ode = field(default_factory=Ode)
    prediction: str = one_of("edm", "edm", "epsilon", "x0", "v")  # what the network's output means


@dataclass
class Curriculum:
    """Parameters of the density that move with images_seen: a pure function of the clock, here of each sample's position."""

    to: dict = field(default_factory=dict)  # parameter -> value at the end; {}: nothing moves
    shape: str = one_of(
        "linear", "linear", "sinusoidal", "high_noise"
    )  # high_noise: rises and falls (arXiv 2404.06353)
    over_images: int = at_least(0, 0)  # when the end is reached; the value stays from there


@dataclass
class Adaptive:
    """A density that follows the progress of the loss in each bin of logSNR, mixed into the configured one."""

    strength: float = at_least(0.0, 0.0)  # share of the draws that follows it; 0: off
    every_images: int = at_least(256 * 2**10, 1)  # between updates


@dataclass
class LearnedSchedule:
    """A monotone schedule learned after Conditional Variational Diffusion Models (arXiv 2312.02246), mixed in likewise."""

    strength: float = at_least(0.0, 0.0)  # share of the draws that follows it; 0: off
    every_images: int = at_least(256 * 2**10, 1)  # between updates
    smoothness: float = at_least(2e-2, 0.0)  # weight of the squared second derivative; the paper's code has 2 x 1e-3


@dataclass
class Noise:
    """The density of noise levels in training; logsnr = 2 ln(unit / sigma), the unit being sigma_data or 1 (models/noise.py)."""

    density: str = one_of(
        *("lognormal", "lognormal", "laplace", "cosine", "cauchy", "flow", "logit_normal", "polynomial"),
        *("fastddpm-uniform", "fastddpm-nonuniform"),
    )
    sigma_unit: str = one_of(
        "auto", "auto", "one", "sigma_data"
    )  # auto: one for ln sigma, polynomial and fastddpm, else sigma_data
    P_mean: float = -0.4  # of ln sigma, lognormal (EDM2: -0.4 for latents, -0.8 for ImageNet-64 pixels)
    P_std: float = 1.0
    mu: float = 0.0  # centre in logsnr: laplace, cosine, cauchy, flow (Hang & Gu 2024; 2 ln(64 / resolution) for a shifted cosine)
    b: float = 0.5  # laplace (0.5 at 256^2, 0.75 at 512^2)
    s: float = 1.0  # cosine: above 1 concentrates
    gamma: float = 0.5  # cauchy
    logit_mean: float = 0.0  # logit_normal, of logit t (Esser et al. 2024)
    logit_std: float = 1.0
    curve: float = 4.0  # polynomial: levels sigma(u^curve) on the rho ramp; larger is less noise (arXiv 2404.06353)
    rho: float = 7.0  # polynomial
    levels: int = at_least(0, 0)  # polynomial: that many discrete levels; 0: continuous
    shift: bool = False  # ... and their index shifted at random by N(levels^(1/5), 1), as the paper's code does
    sigma_min: float = at_least(0.0, 0.0)  # 0: no lower bound (polynomial: 0.002)
    sigma_max: float = at_least(0.0, 0.0)  # 0: no upper bound (polynomial: 80)
    floor: float = at_least(0.0, 0.0)  # share of draws that are uniform in logsnr over the next two; 0: none
    floor_sigma_min: float = 0.002
    floor_sigma_max: float = 80.0
    curriculum: Curriculum = field(default_factory=Curriculum)
    adaptive: Adaptive = field(default_factory=Adaptive)
    learned: LearnedSchedule = field(default_factory=LearnedSchedule)


@dataclass
class Loss:
    """The training objective (Karras et al. 2024, Eq. 14-21)."""

    uncertainty: bool = True
    weighting: str = one_of(
        "edm", "edm", "constant", "min_snr", "soft_min_snr", "p2"
    )  # without uncertainty (trainer/loss.py)
    gamma: float = 0.0  # of min_snr, soft_min_snr, p2; 0: 5, 5, 1
    p2_k: float = 1.0
    label_dropout: float = at_least(0.0, 0.0)


@dataclass
class Optimizer:
    """Adam on magnitude-preserving shards; betas from Karras et al. 2024, Table 1."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    nonfinite: str = one_of("stop", "stop", "skip", "zero")
    max_skipped_steps: int = at_least(10, 0)  # with nonfinite=skip: more than this many in a run stop it
    one_pass: str = one_of(
        "auto", "auto", "true", "false"
    )  # fused; auto: on GPUs, and on CPUs with engine.compile=true


@dataclass
class LearningRate:
    """Inverse-square-root decay with linear ramp-up (Karras et al. 2024, Eq. 67), in images."""

    ref_lr: float = 0.01
    decay_images: int = at_least(143_360_000, 0)  # 70,000 batches of 2,048; 0: no decay
    rampup_images: int = at_least(10_000_000, 0)  # 0: none


@dataclass
class Ema:
    """Power-function averages tracked during training, by their relative width."""

    sigma_rel: list[float] = list_of(0.05, 0.10)


@dataclass
class Snapshots:
    """EMA snapshots for post-hoc reconstruction."""

    every_images: int = at_least(8 * 2**20, 0)  # 0: none
    dtype: str = one_of("fp16", "fp16", "bf16", "fp32")


@dataclass
class Checkpoints:
    """The state a run continues from, bitwise."""

    every_images: int = at_least(128 * 2**20, 0)  # 0: only when stopping
    keep_last: int = at_least(2, 1)
    keep_every_images: int = at_least(0, 0)  # keep those at its multiples for good; 0: none


@dataclass
class Data:
    """The shards."""

    path: str = required()
    codec: str = "sd-vae-ft-mse"  # must equal the manifest's: a network trained on other latents is another network
    encode_from: str = ""  # source for data_pipeline.encode when `path` has no manifest yet
    window: int = at_least(16, 1)  # shards whose samples are mixed
    reader: str = one_of("indexed", "indexed", "stock")  # stock: the libraries' own iterators, behind guards
    verify: bool = True  # check every sample against its hash in the index
    on_bad: str = one_of("stop", "stop", "replace")  # replace: deterministically, counted, up to max_bad
    max_bad: int = at_least(0, 0)  # samples; 0: one in 10,000
    audit: str = ""  # a folder: every position trained on is recorded there; none where empty
    threads: int = at_least(1, 1)  # that copy samples into a batch
    access: str = one_of("auto", "auto", "mmap", "pread")  # auto: mmap, but pread on file systems of a network
    heldout: float = at_least(
        0.0, 0.0
    )  # share of the samples that training never sees, by a hash of their number; try 0.01
    stage: bool = (
        False  # read a shared folder as a remote `path`: every node copies to cache_folder what it reads, once
    )
    cache_folder: str = (
        "~/.cache/evenkeel"  # for a remote `path`: shards are fetched whole; ranks and jobs of a node share it; $TMPDIR
    )
    cache_bytes: int = at_least(64 * 2**30, 1)


@dataclass
class Engine:
    """How the step is executed."""

    zero_stage: int = field(default=1, metadata={"choices": (0, 1, 2, 3)})
    weights: str = one_of(
        "fp32", "fp32", "bf16"
    )  # that the forward sees; masters, averages and sums of gradients are fp32
    activations: str = one_of("fp32", "fp32", "bf16", "fp16")
    activation_checkpointing: bool = False
    compile: str = one_of("auto", "auto", "true", "false")  # auto: where there is a GPU
    cuda_graphs: bool = (
        False  # replay the compiled network as CUDA graphs: for micro-batches so small that launching takes longest
    )
    # keep the convolutions' fp32 weights scaled and cast as 16-bit activations want them, from step to step: 2 bytes a parameter;
    # no effect where activations are fp32 or weights are bf16, and at stage 3
    prepare_weights: bool = True
    overlap: bool = True  # reduce gradients while the backward goes on (GPUs)
    deterministic: bool = False  # the same bits in every repetition on the same GPUs; CPUs do so anyway
    hang_seconds: int = at_least(
        600, 0
    )  # without a step for so long, every rank dumps its stacks and asks to be restarted; 0: off
    hang_steps: int = at_least(
        100, 0
    )  # ... or, where that is sooner, for so many times a usual step, but two minutes; 0: off

    @property
    def prepares(self) -> bool:
        """Say whether weights are scaled and cast once a step (models/prepared.py); stage 3 has them whole nowhere."""
        return (
            self.prepare_weights
            and self.activations != "fp32"
            and self.weights == "fp32"
            and self.zero_stage in (0, 1, 2)
        )


@dataclass
class Metrics:
    """What is exported, how often."""

    every_images: int = at_least(128 * 2**10, 1)
    address: str = "127.0.0.1"
    port: int = at_least(0, 0)  # 0: any free one; it is written to RUN/targets/
    peak_flops: float = at_least(
        0.0, 0.0
    )  # FLOP/s of one device that MFU is measured against; 0: by its name, trainer/peaks.py
    tensorboard: bool = False  # also to RUN/tensorboard/; needs the package tensorboard
    wandb: str = ""  # also to this project of Weights & Biases; needs the package wandb
    profile_at_images: int = at_least(
        0, 0
    )  # trace three steps from this clock on, as touching RUN/profile does; 0: none


@dataclass
class Cluster:
    """Where the ranks run, and what follows the training."""

    kind: str = one_of("local", "local", "slurm")
    nodes: int = at_least(1, 1)
    ranks_per_node: int = at_least(1, 1)
    gpus_per_node: int = at_least(0, 0)
    cpus_per_rank: int = at_least(1, 1)
    memory_gb: int = at_least(0, 0)  # per node; 0: the partition's default
    time_minutes: int = at_least(0, 0)  # 0: the partition's default
    signal_seconds: int = at_least(120, 0)  # warning before the time limit; a save must fit
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    mail_user: str = ""
    dependency: str = ""  # as sbatch takes it: afterok:1234
    slurm_parameters: dict = field(default_factory=dict)  # any further sbatch options, by name
    srun_arguments: list[str] = list_of()  # further arguments of srun, for instance --container-image=...
    setup: list[str] = list_of()  # lines of the batch script before srun
    environment: dict = field(default_factory=dict)  # variables of every rank, for instance NCCL_SOCKET_IFNAME: ib0
    umask: str = ""  # octal, for instance "0027": files readable by the group; empty: as it is
    preflight: bool = (
        False  # look at every node before the ranks meet; a bad one is named, left out and the job requeued
    )
    preflight_seconds: int = at_least(300, 1)  # ... and give up on a node that does not answer by then
    gpu: str = "A100"  # what a GPU is, for predictions before the run (trainer/peaks.py)
    expected_mfu: float = at_least(0.35, 0.01)  # ... and the share of its peak that they assume
    max_restarts: int = at_least(3, 0)  # in a row without progress of the clock
    evaluate_snapshots: bool = (
        False  # beside the training, on idle CPU time of rank 0's node: loss and a grid per snapshot
    )
    finish_sigma_rel: float = at_least(0.0, 0.0)  # after the run: reconstruct this EMA length; 0: nothing
    finish_images_per_class: int = at_least(8, 0)  # ... and draw a grid with it


@dataclass
class Config:
    """A whole run."""

    run: str = required()  # the run directory
    duration_images: int = required(1)
    global_batch: int = required(1)
    micro_batch: int = required(1)  # samples of one forward on one rank
    seed: int = at_least(0, 0)
    start_from: str = ""  # a snapshot, reconstruction or import whose weights a new run begins with; empty: random ones
    model: Model = field(default_factory=Model)
    noise: Noise = field(default_factory=Noise)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr: LearningRate = field(default_factory=LearningRate)
    ema: Ema = field(default_factory=Ema)
    snapshots: Snapshots = field(default_factory=Snapshots)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    data: Data = field(default_factory=Data)
    engine: Engine = field(default_factory=Engine)
    metrics: Metrics = field(default_factory=Metrics)
    cluster: Cluster = field(default_factory=Cluster)
