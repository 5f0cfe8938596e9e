"""All fields of a config with their defaults: network and training of DDPM on CIFAR-10 (Ho et al. 2020), 50 DDIM steps.

The other configs change some of these fields. `ddim_jax/config/schema.py` defines the types and the ranges.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "default"  # the name of output folders, and of the shipped weights if they exist

    config.pretrained = ""  # a checkpoint to sample, or to start training from: a diffusers folder or
    # hub id, a ckpt.pth of the official code, a workdir, a .safetensors file;
    # it sets config.schedule, and config.model except dropout, dtype and remat

    config.data = data = ConfigDict()
    data.name = "digits"  # digits | folder | npz | cifar10 | celeba64 | lsun_bedroom256 |
    # lsun_church256 | tfds: a data set prepared by tensorflow-datasets, or your
    # data set "module:function"
    data.path = ""  # the folder (with train/ and test/, or flat), the .npz file, or the name
    # of the data set in tensorflow-datasets
    data.flip = False  # mirror training images left to right with probability 1/2
    data.in_memory = False  # read all images once and keep them in memory
    data.workers = 0  # processes that read and decode images; 0: threads of the main process
    data.options = {}  # arguments of the data set; of "folder": image_size, crop, resize, for images of mixed sizes

    config.model = model = ConfigDict()
    model.name = "unet"  # unet | dit, or your network "module:attribute"; the fields below are
    # those of the U-Net; for those of the DiT see configs/digits_dit.py
    model.image_size = 32  # height and width; divisible by 2^(len(channel_mult) - 1)
    model.image_channels = 3
    model.patch_size = 1  # above 1: patches of this side length are the positions of the network
    model.channels = 128  # number of channels at full resolution
    model.channel_mult = (1, 2, 2, 2)  # multiplier of the channels at each resolution, from the highest down;
    # it may be a fraction, such as 1.5
    model.num_res_blocks = 2  # per resolution in the encoder; the decoder has one more
    model.attention_resolutions = (16,)  # resolutions with self-attention after every block
    model.attention_resolutions_down = ()  # further resolutions with it, in the encoder only
    model.attention_resolutions_up = ()  # the same, in the decoder only
    model.middle_attention = True  # self-attention in the middle block
    model.middle_groups = 0  # groups of GroupNorm before it; 0: as model.groups; -1: no GroupNorm
    model.head_channels = 0  # channels per attention head; 0: num_heads heads
    model.num_heads = 0  # attention heads where head_channels is 0; 0: one head, as in DDPM
    model.groups = 32  # groups of GroupNorm
    model.norm_epsilon = 1e-6  # epsilon of GroupNorm
    model.scale_shift = False  # the time embedding scales and shifts after the second norm, as in ADM
    model.resample = "conv"  # conv | block: residual blocks downsample and upsample, as in ADM
    model.downsample_padding = "end"  # end | both: zero padding before a stride-2 convolution
    model.frequency_shift = 1.0  # s in the frequencies 10000^(-i / (half - s)) of the time embedding
    model.cos_first = False  # order of the time embedding: True: cos, sin; False: sin, cos
    model.time_channels = 0  # features of the sinusoids; 0: as many as model.channels
    model.time_scale = 1.0  # the network gets time_scale * time; 1000 / T in improved-diffusion
    model.learn_sigma = False  # twice the output channels: the second half is for a learned variance
    model.dropout = 0.1  # dropout rate in the residual blocks
    model.num_classes = 0  # above 0: class-conditional; the data must have labels
    model.label_dropout = 0.0  # probability that a label is dropped in training, for guidance
    model.dtype = "float32"  # float32 | bfloat16: dtype of the computation; parameters are float32
    model.remat = False  # rematerialisation: less memory in training, a third more time
    model.prediction = "eps"  # eps | x0 | v | edm: prediction type of the network

    config.schedule = schedule = ConfigDict()
    schedule.name = "linear"  # linear | scaled_linear | cosine | sigmoid | from_betas; in closed form for
    # all real t: vp | log_snr; or your schedule "module:attribute"
    schedule.num_steps = 1000  # T, the number of diffusion steps
    schedule.beta_start = 1e-4  # for linear, scaled_linear, sigmoid, vp
    schedule.beta_end = 0.02  # for the same schedules
    schedule.betas = ()  # for from_betas: beta_1 .. beta_T
    schedule.log_snr_max = 13.3  # for log_snr: log(alpha_bar / (1 - alpha_bar)) at t = 0
    schedule.log_snr_min = -10.0  # for log_snr: the same at t = T
    schedule.options = {}  # arguments of your schedule, if schedule.name is "module:attribute"
    schedule.zero_terminal_snr = False  # alpha_bar is 0 at T (Lin et al. 2023); for model.prediction x0 and v

    config.train = train = ConfigDict()
    train.num_steps = 800_000  # number of updates
    train.batch_size = 128  # over all devices
    train.seed = 0  # of the initial parameters, the data order and the noise
    train.learning_rate = 2e-4  # the maximum of the learning rate
    train.warmup = 5000  # steps of linear warmup to the maximum
    train.clip_norm = 1.0  # gradients are clipped to this global norm
    train.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # adam | adamw | lion | muon | sgd, another optimizer of optax, for example
    # "optax:adabelief", or yours; its arguments are fields: optimizer.b1,
    # optimizer.weight_decay, ...
    optimizer.schedule = "constant"  # learning rate after warmup: constant | cosine | inverse_sqrt
    optimizer.schedule_options = {}  # arguments of the learning-rate schedule
    train.objective = objective = ConfigDict()
    objective.name = "noise_prediction"  # L_gamma, Eq. (5), or your objective "module:function"
    objective.weight = "one"  # gamma_t: one (as in the paper) | x0 | v (unweighted error of x_0, of v) |
    # min_snr | p2 | edm
    objective.weight_options = {}  # arguments of the loss weight
    objective.time = "uniform"  # distribution of t: uniform | real (uniform in [1, T]) | logit_normal |
    # importance
    objective.time_options = {}  # arguments of the distribution
    objective.options = {}  # arguments of your objective
    train.ema_decay = 0.9999  # decay of the moving average of the parameters, with which samples are drawn
    train.ema_schedule = "constant"  # constant | warmup: min(ema_decay, (1 + k) / (10 + k)); or "module:function"
    train.accumulate = 1  # gradient accumulation steps; the memory is that of one microbatch
    train.max_skipped = 20  # training ends after this number of consecutive updates that are not finite
    train.log_every = 100  # steps between entries of metrics.jsonl and TensorBoard
    train.checkpoint_every = 5000  # steps between checkpoints; a multiple of log_every
    train.keep = 3  # number of latest checkpoints that are retained
    train.keep_every = 100_000  # checkpoints at multiples of this step are retained too; 0: none
    train.grid_every = 10_000  # steps between sample grids in the workdir; 0: only at the end
    train.evaluate_every = 0  # steps between evaluations with config.evaluate; 0: none
    train.evaluate_images = 1000  # number of images in these evaluations
    train.wandb = ""  # also log to this project of Weights & Biases; empty: no

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices of the data axis: the batch is sharded; -1: all devices / fsdp
    mesh.fsdp = 1  # devices of the fsdp axis: batch, parameters and optimizer are sharded

    config.sample = sample = ConfigDict()
    sample.sampler = (
        "ddim"  # ddim | ddpm | ddpm_hat | ddpm_learned; higher-order solvers, not in the paper: heun | ab2 |
    )
    # ab4 | plms | dpm_solver_pp_2m | dpm_solver_pp_3m | unipc
    sample.eta = 0.0  # Eq. (16): 0 is DDIM, 1 is DDPM; for the sampler ddim
    sample.steps = 50  # S = dim(tau), the number of sampling steps
    sample.tau = placeholder(str)  # uniform | quadratic | leading | trailing | linspace | official_uniform |
    # official_quadratic; real timesteps, for any number of steps, evenly
    # spaced in the named quantity: time | log_snr | sigma | karras; or custom
    # timesteps: "1,50,150,250.5,400,550,700,850,1000"; or those of
    # improved-diffusion: "respaced:10,15,20" | "ddim50"; not set: as in
    # config.pretrained, or uniform without it
    sample.tau_offset = 0  # added to every timestep of tau
    sample.tau_end = 0  # the timestep at which the last step ends; 0: x_0
    sample.fixed_stride = False  # every step is from t to t - T // S, as in diffusers, not to the next timestep
    sample.num_images = 64  # number of images to draw
    sample.batch_size = 64  # images per batch; changes only the rounding of the images
    sample.seed = 0  # the noise of image i depends only on (seed, i); below 2^32
    sample.clip_x0 = placeholder(bool)  # clip the predicted x_0; not in the paper; not set: as in
    # config.pretrained, or False without it
    sample.clip_range = 1.0  # with clip_x0: x_0 is clipped to [-clip_range, clip_range]
    sample.clip_quantile = 0.0  # with clip_x0, above 0: dynamic thresholding: the bound is this quantile of
    # |x_0|, at least 1 and at most clip_range, and x_0 is divided by the bound
    sample.keep_eps = False  # with clip_x0: eps is not recomputed from the clipped x_0, as in diffusers
    sample.ema = True  # True: the EMA parameters; False: the raw parameters (with --workdir)
    sample.options = {}  # arguments of your sampler, if sample.sampler is "module:attribute"
    sample.refine = 0  # exact DDIM inversion in encoding: fixed-point iterations per step, one
    # network call each (10 to 20); 0: the explicit step of the paper
    sample.label = -1  # class of all images, if class-conditional; -1: image i has class i mod n
    sample.guidance = 1.0  # scale of classifier-free guidance; 1: no guidance

    config.evaluate = evaluate = ConfigDict()
    evaluate.features = "inception"  # inception (the network of FID) | digits | yours: "module:function"
    evaluate.weights = ""  # weights file of the feature network; empty: downloaded once, or shipped
    evaluate.metrics = "fid,kid,inception_score,precision_recall"  # also confidence,
    # nearest, agreement (of the predicted class with the label of the sample)
    evaluate.num_images = 50_000  # exact number of samples that are evaluated
    evaluate.batch_size = 50  # images per batch, over all devices
    evaluate.reference = ""  # real images, or their statistics; empty: those of config.data
    evaluate.split = "train"  # train | test: the split of config.data
    return config
