"""Every field, with its default: DDPM's network and training for CIFAR-10 (Ho et al. 2020), DDIM with 50 steps.

The other configs are deltas on this one. Types and ranges are checked in `ddim_jax/config.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "default"  # names output folders, and the shipped weights where there are any

    config.pretrained = ""  # a checkpoint to sample, or to start training from: a diffusers folder or
    # hub id, a ckpt.pth of the official code, a workdir, a .safetensors file;
    # config.model (but dropout, dtype) and config.schedule are then its own

    config.data = data = ConfigDict()
    data.name = "digits"  # digits | folder | npz | cifar10 | celeba64 | lsun_bedroom256 |
    # lsun_church256 | tfds: these as tensorflow-datasets has prepared them
    data.path = ""  # the folder (with train/ and test/, or flat), the .npz file, or the name
    # that tensorflow-datasets gives to the data set
    data.flip = False  # mirror training images left to right at random
    data.in_memory = False  # read all images once, and hold them
    data.workers = 0  # processes that read and decode images; 0: threads of this one

    config.model = model = ConfigDict()
    model.name = "unet"  # unet | dit, or a network of yours, "module:attribute"; the fields
    # below are the U-Net's: for another see configs/digits_dit.py
    model.image_size = 32  # height and width; divisible by 2^(len(channel_mult) - 1)
    model.image_channels = 3
    model.patch_size = 1  # above 1: squares of so many pixels are one position of the network
    model.channels = 128  # channels at full resolution
    model.channel_mult = (1, 2, 2, 2)  # times this at each resolution, from full size down
    model.num_res_blocks = 2  # on the way down at each resolution; one more on the way up
    model.attention_resolutions = (16,)  # sizes with self-attention after every block
    model.middle_attention = True  # self-attention in the middle too
    model.head_channels = 0  # channels of an attention head; 0: one head, as in DDPM
    model.groups = 32  # of GroupNorm
    model.norm_epsilon = 1e-6  # of GroupNorm
    model.downsample_padding = "end"  # end | both: where zeros are added before a stride-2 convolution
    model.frequency_shift = 1.0  # s of the time embedding's frequencies 10000^(-i / (half - s))
    model.cos_first = False  # the time embedding is cos, sin instead of sin, cos
    model.dropout = 0.1
    model.num_classes = 0  # above 0: class-conditional, the data must have labels
    model.label_dropout = 0.0  # above 0: this share of the labels is hidden in training, for guidance
    model.dtype = "float32"  # float32 | bfloat16: what convolutions compute in; parameters are float32
    model.remat = False  # less memory in training, a third more time: blocks are computed twice
    model.prediction = "eps"  # eps | x0 | v: what the network's output means

    config.schedule = schedule = ConfigDict()
    schedule.name = "linear"  # linear | scaled_linear | cosine | sigmoid | from_betas, and in closed form,
    # for all real t: vp | log_snr
    schedule.num_steps = 1000  # T
    schedule.beta_start = 1e-4  # of linear, scaled_linear, sigmoid, vp
    schedule.beta_end = 0.02
    schedule.betas = ()  # of from_betas: beta_1 .. beta_T
    schedule.log_snr_max = 13.3  # of log_snr: log(alpha_bar / (1 - alpha_bar)) at t = 0, and at t = T
    schedule.log_snr_min = -10.0
    schedule.options = {}  # arguments of a schedule of yours, name = "module:attribute"
    schedule.zero_terminal_snr = False  # no signal at T (Lin et al. 2023), for prediction x0 and v

    config.train = train = ConfigDict()
    train.num_steps = 800_000
    train.batch_size = 128  # over all devices
    train.seed = 0
    train.learning_rate = 2e-4  # its maximum
    train.warmup = 5000  # steps over which the learning rate rises to that
    train.clip_norm = 1.0  # global norm of the gradient
    train.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # adam | adamw | lion | muon | sgd, any of optax, "optax:adabelief", or yours;
    # its arguments are fields: optimizer.b1, optimizer.weight_decay, ...
    optimizer.schedule = "constant"  # of the learning rate after warmup: constant | cosine | inverse_sqrt
    optimizer.schedule_options = {}  # its arguments
    train.objective = objective = ConfigDict()
    objective.name = "noise_prediction"  # L_gamma, Eq. (5), or "module:function"
    objective.weight = "one"  # gamma_t: one (the paper's) | x0 | v (plain error of these) | min_snr | p2
    objective.weight_options = {}  # its arguments
    objective.time = "uniform"  # how t is drawn: uniform | real (all of [1, T]) | logit_normal | importance
    objective.time_options = {}  # its arguments
    objective.options = {}  # arguments of an objective of yours
    train.ema_decay = 0.9999  # of the moving average that is sampled
    train.ema_schedule = "constant"  # constant | warmup: min(ema_decay, (1 + k) / (10 + k)); or "module:function"
    train.accumulate = 1  # parts of the batch, one after the other: memory for one, gradients of all
    train.max_skipped = 20  # updates in a row that may be left out because they are not finite
    train.log_every = 100  # steps between lines of metrics.jsonl and TensorBoard
    train.checkpoint_every = 5000  # a multiple of log_every
    train.keep = 3  # latest checkpoints that are kept
    train.keep_every = 100_000  # and every one at a multiple of this, for ever; 0: none
    train.grid_every = 10_000  # steps between sample grids in the workdir; 0: at the end alone
    train.evaluate_every = 0  # steps between evaluations, by what config.evaluate says; 0: none
    train.evaluate_images = 1000  # but with so many images
    train.wandb = ""  # also log to this project of Weights & Biases

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices along which the batch alone is divided; -1: all that fsdp leaves
    mesh.fsdp = 1  # devices along which parameters and optimizer are divided as well

    config.sample = sample = ConfigDict()
    sample.sampler = "ddim"  # ddim | ddpm | ddpm_hat, and of higher order, beyond the paper: heun | ab2 |
    # ab4 | plms | dpm_solver_pp_2m | dpm_solver_pp_3m | unipc
    sample.eta = 0.0  # Eq. (16): 0 is DDIM, 1 is DDPM; of the sampler ddim
    sample.steps = 50  # S = dim(tau)
    sample.tau = placeholder(str)  # uniform | quadratic | leading | trailing | linspace | official_uniform |
    # official_quadratic; between the levels, for any number of steps:
    # time | log_snr | sigma | karras, evenly spaced in these; or the levels
    # themselves: "1,50,150,250.5,400,550,700,850,1000";
    # open: as config.pretrained says, without one uniform
    sample.tau_offset = 0  # added to every level of tau
    sample.tau_end = 0  # the level that the last step ends at; 0: the image itself
    sample.fixed_stride = False  # every step from t to t - T // S, as in diffusers, whatever level comes next
    sample.num_images = 64
    sample.batch_size = 64  # does not change the images but for rounding
    sample.seed = 0  # the noise of image i depends on (seed, i) alone; below 2^32
    sample.clip_x0 = placeholder(bool)  # bound the predicted x_0; the paper does not;
    # open: as config.pretrained says, without one False
    sample.clip_range = 1.0  # with clip_x0: to [-1, 1]
    sample.clip_quantile = 0.0  # with clip_x0, above 0: dynamic thresholding, the bound is this quantile of
    # |x_0|, but at least 1 and at most clip_range, and x_0 is divided by it
    sample.keep_eps = False  # with clip_x0: eps stays as predicted, as in diffusers
    sample.ema = True  # False: the raw parameters instead of their moving average (with --workdir)
    sample.options = {}  # arguments of a sampler of yours, sampler = "module:attribute"
    sample.refine = 0  # of encoding: network calls a step that solve it, so that decoding returns
    # the image (10 to 20); 0: the paper's explicit step
    sample.label = -1  # the class, for class-conditional networks; -1: image i has class i mod n
    sample.guidance = 1.0  # classifier-free guidance: above 1, more of what the class adds; 1: none

    config.evaluate = evaluate = ConfigDict()
    evaluate.features = "inception"  # inception (FID's network) | digits | a function of yours: "module:function"
    evaluate.weights = ""  # the file of its weights; empty: the usual ones, fetched once or shipped
    evaluate.metrics = "fid,kid,inception_score,precision_recall"  # also confidence,
    # nearest, and agreement with the class that an image was drawn as
    evaluate.num_images = 50_000  # exactly so many samples are judged
    evaluate.batch_size = 50  # over all devices
    evaluate.reference = ""  # real images, or statistics of them; empty: those of config.data
    evaluate.split = "train"  # train | test: which of config.data's
    return config
