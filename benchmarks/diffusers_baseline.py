"""The baseline of `benchmarks.suite`: diffusers on PyTorch."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export
from ddim_jax.config import Config
from ddim_jax.utils.errors import ConfigError

EAGER, CHANNELS_LAST, COMPILED = "diffusers", "channels_last", "torch.compile"

Runs = dict[str, Callable[[], Any]]


class DiffusersBaseline:
    """The network in diffusers, with the weights of ddim_jax, in three variants: eager, channels_last, torch.compile.

    params: the parameters in ddim_jax. compiled: whether to include torch.compile. ConfigError if PyTorch or diffusers
    is not installed.
    """

    def __init__(self, config: Config, params: Any, compiled: bool):
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise ConfigError(f'--competitors: needs pip install -e ".[parity]" ({error})') from error

        self.torch, self.diffusers = torch, diffusers
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
        diffusers.utils.logging.set_verbosity_error()
        values = dataclasses.asdict(config)
        values["sample"]["tau"] = "leading"
        with tempfile.TemporaryDirectory() as folder:
            diffusers_export.save(pathlib.Path(folder) / "pipeline", params, values, "")
            load = lambda: diffusers.UNet2DModel.from_pretrained(f"{folder}/pipeline/unet").to(self.device, self.dtype)
            self.networks = {EAGER: load(), CHANNELS_LAST: load().to(memory_format=torch.channels_last)}
            if compiled:
                mode = "max-autotune" if self.device == "cuda" else "default"
                self.networks[COMPILED] = load().to(memory_format=torch.channels_last)
                self.networks[COMPILED].compile(mode=mode)  # in place, because a pipeline accepts no wrapper

    def wait(self) -> None:
        """Waits until the device has finished."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def tensor(self, x: np.ndarray, name: str) -> Any:
        """x (B, H, W, C) as a tensor (B, C, H, W), in the memory format of the variant `name`."""
        layout = self.torch.contiguous_format if name == EAGER else self.torch.channels_last
        tensor = self.torch.tensor(x.transpose(0, 3, 1, 2)).to(self.device, self.dtype)
        return tensor.contiguous(memory_format=layout)

    def forward(self, x: np.ndarray) -> Runs:
        """One forward pass of each variant."""

        def run(network: Any, tensor: Any) -> None:
            with self.torch.inference_mode():
                network(tensor, 499)
                self.wait()

        tensors = {name: self.tensor(x, name) for name in self.networks}
        return {name: (lambda n=n, name=name: run(n.eval(), tensors[name])) for name, n in self.networks.items()}

    def ddim(self, batch: int, S: int) -> Runs:
        """S steps of DDIM for each variant, by `DDIMPipeline`. It cannot convert bfloat16 to NumPy, so in bfloat16 the
        same steps are written out.
        """

        def by_pipeline(network: Any) -> None:
            pipeline = self.diffusers.DDIMPipeline(network, self.diffusers.DDIMScheduler(clip_sample=False))
            pipeline.set_progress_bar_config(disable=True)
            pipeline(batch_size=batch, num_inference_steps=S, eta=0.0, output_type="np")
            self.wait()

        def by_steps(network: Any) -> None:
            scheduler = self.diffusers.DDIMScheduler(clip_sample=False)
            scheduler.set_timesteps(S)
            size = network.config.in_channels, network.config.sample_size, network.config.sample_size
            with self.torch.inference_mode():
                image = self.torch.randn((batch, *size), device=self.device, dtype=self.dtype)
                for t in scheduler.timesteps:
                    image = scheduler.step(network(image, t).sample, t, image, eta=0.0).prev_sample
                (image / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
            self.wait()

        run = by_pipeline if self.dtype == self.torch.float32 else by_steps
        return {name: (lambda n=n: run(n.eval())) for name, n in self.networks.items()}

    def training(self, config: Config, pixels: np.ndarray) -> Runs:
        """One update of each variant: loss, gradient, clipping, Adam, and moving average."""
        torch = self.torch
        alpha_bar = torch.tensor(config_lib.noise_schedule(config.schedule).alpha_bar[1:], dtype=self.dtype)
        alpha_bar = alpha_bar.to(self.device)

        def run(name: str) -> Callable[[], None]:
            network = self.networks[name].train()
            parameters = list(network.parameters())
            average = [parameter.detach().clone() for parameter in parameters]
            optimizer = torch.optim.Adam(parameters, lr=config.train.learning_rate)
            x_0 = self.tensor(pixels.astype(np.float32) / 127.5 - 1, name)

            def once() -> None:
                t, eps = torch.randint(0, len(alpha_bar), (len(x_0),), device=self.device), torch.randn_like(x_0)
                level = alpha_bar[t].reshape(-1, 1, 1, 1)
                predicted = network(level.sqrt() * x_0 + (1 - level).sqrt() * eps, t).sample
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.mse_loss(predicted, eps).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
                optimizer.step()
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - config.train.ema_decay)
                self.wait()

            return once

        return {name: run(name) for name in self.networks}
