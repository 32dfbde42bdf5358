"""Training: the stages in order, then the loop. Source, where no file is named: train_network.py."""

import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import SafetensorError  # type: ignore[attr-defined]
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from kohya import metrics, states
from kohya.builtin import BuiltinError, metadata, state
from kohya.builtin.dataset import Dataset, Picture, batches, cache_latents, latents, open_dataset
from kohya.builtin.lora import LoRA
from kohya.builtin.model import VAE_SCALE, BaseModel, encode, load_base_model
from kohya.builtin.options import Options
from kohya.config import Kind
from kohya.problem import counted

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
OutOfMemoryError = torch.OutOfMemoryError
_say = partial(print, flush=True)
_SECONDS_BETWEEN_LINES = 10


class TrainingError(BuiltinError):
    """Training cannot go on."""


@dataclass
class Stop:
    """What SIGTERM does: at once before training, and after the running optimizer step during it."""

    asked: bool = False
    in_loop: bool = False

    def __call__(self, _signal: int, _frame: object) -> None:
        self.asked = True
        if not self.in_loop:
            raise SystemExit(143)


def train(kind: Kind, options: Options, stop: Stop) -> Path:
    """Train a LoRA and return its file, or raise SystemExit(143) after a state was saved because of `stop`.

    Raises BuiltinError of some kind, or MissingTokenizers: plain sentences.
    """
    session = random.randint(0, 2**32)
    resumed = state.load(Path(options.resume)) if options.resume else None
    drawn = random.randint(0, 2**32)
    seed = resumed[0].seed if resumed else drawn if options.seed is None else options.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of all devices

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise TrainingError('mixed_precision = "fp16" needs a GPU, and there is none; use "bf16" or "no".')
    with _phase("reading the data set"):
        dataset = open_dataset(options)
    epoch = counted(len(dataset), "batch", "batches")
    _say(f"{counted(len(dataset.pictures), 'picture')}, {epoch} an epoch")
    with _phase("loading the base model"):
        base = load_base_model(
            Path(options.pretrained_model_name_or_path),
            kind,
            _DTYPES[options.mixed_precision or "no"],
            Path(options.tokenizer_cache_dir) if options.tokenizer_cache_dir else None,
            vae_dtype=torch.float32 if options.no_half_vae else None,
            draw_as_sd_scripts=True,
        )
        base.vae.to(device)
    if options.cache_latents:
        with _phase("caching latents"):
            told = time.monotonic()
            for done in cache_latents(dataset, base.vae, device):
                if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    _say(f"caching latents {done}/{len(dataset.pictures)}")
        base.vae.to("meta")  # gives its memory back
    with _phase("making the LoRA"):
        run = _Run(base, dataset, options, device)
    run.at.seed = seed
    if resumed:
        run.resume(*resumed)
    run.metadata = metadata.of_training(
        kind, options, dataset, seed=seed, session=session, steps=run.steps, epochs=run.epochs
    )
    stop.in_loop = True
    try:
        return run.train(stop)
    finally:
        if run.events:
            run.events.close()


@contextmanager
def _phase(name: str) -> Iterator[None]:
    _say(name)
    start = time.monotonic()
    yield
    _say(f"{name} took {time.monotonic() - start:.1f} s")


class _Run:
    """A run from its first optimizer step to its last file. `at` is where it stands."""

    metadata: dict[str, str]

    def __init__(self, base: BaseModel, dataset: Dataset, options: Options, device: torch.device) -> None:
        self.base, self.dataset, self.options, self.device = base, dataset, options, device
        self.dtype = _DTYPES[options.mixed_precision or "no"]
        self.train_text = not options.network_train_unet_only
        alpha = 1.0 if options.network_alpha is None else options.network_alpha
        dim = options.network_dim or 4  # networks/lora.py:431
        unet = not options.network_train_text_encoder_only
        self.lora = LoRA(base, dim, alpha, text=self.train_text, unet=unet)
        for part in (base.unet, *base.text_encoders, self.lora):
            part.to(device)
        if options.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()
            for encoder in base.text_encoders if self.train_text else ():
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
                encoder.train()

        per_epoch = math.ceil(len(dataset) / options.gradient_accumulation_steps)
        self.steps: int = (options.max_train_epochs or 0) * per_epoch or options.max_train_steps
        self.epochs = math.ceil(self.steps / per_epoch)
        self.groups, self.optimizer = self._optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _schedule(options, self.steps))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.noise = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)  # :212-214
        self.metrics, self.timer = metrics.Writer(), states.Timer()
        logs = Path(options.logging_dir or "", f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")
        flush = int(states.FLUSH_SECONDS)
        self.events = (
            SummaryWriter(str(logs / "network_train"), flush_secs=flush) if options.logging_dir else None
        )
        self.at = state.Position(fingerprint=self._fingerprint())

    def resume(self, at: state.Position, tensors: dict[str, torch.Tensor], parts: dict[str, Any]) -> None:
        """Go on where the state was taken. Raises StateError where it belongs to another run."""
        state.check(at, self._fingerprint(), self.steps)
        self.at = at
        self.lora.load_state_dict(tensors)
        self.optimizer.load_state_dict(parts["optimizer"]["optimizer"])
        self.scaler.load_state_dict(parts["optimizer"]["scaler"])
        self.scheduler.load_state_dict({"lr_lambdas": [None] * len(self.groups), **parts["scheduler"]})
        self.dataset.go_to_epoch(at.current_epoch)
        state.restore_generators(parts["random_states"])
        _say(f"resuming at step {at.current_step}/{self.steps}")

    def train(self, stop: Stop) -> Path:
        """All epochs that are left, then the LoRA. Raises SystemExit(143) where `stop` asks for it."""
        options, at = self.options, self.at
        images = options.train_batch_size * options.gradient_accumulation_steps
        self.metrics.write(metrics.Start(self.steps, self.epochs, images, at.current_step, os.getpid()))
        while at.current_step < self.steps or not at.epoch_ended:
            self._epoch(stop)
        if options.save_state or options.save_state_on_train_end:
            self._save_state(f"{options.output_name or 'last'}-state")
        path = self._save_lora(options.output_name or "last", self.epochs)
        _say(f"training is done: {counted(at.current_step, 'step')}, average loss {at.average:.4f}")
        return path

    def _epoch(self, stop: Stop) -> None:
        options, at = self.options, self.at
        if at.epoch_ended:  # a new one, and not the rest of one
            torch.empty((), dtype=torch.int64).random_()  # torch's loader first draws a seed for its workers
            at.order_seed = int(torch.empty((), dtype=torch.int64).random_().item())
            at.current_epoch, at.batch, at.epoch_ended = at.current_epoch + 1, 0, False
        _say(f"epoch {at.current_epoch}/{self.epochs}")
        self.lora.train()
        generator = torch.Generator().manual_seed(at.order_seed)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        while at.batch < len(order) and at.current_step < self.steps:
            self._optimizer_step(order)
            self._save_between_steps(stop)

        self._write({"loss/epoch_average": at.average}, at.current_epoch)
        at.epoch_ended = True
        every, last = options.save_every_n_epochs, at.current_epoch >= self.epochs
        if every and at.current_epoch % every == 0 and not last:
            name = f"{options.output_name or 'epoch'}-{at.current_epoch:06d}"
            self._save_lora(name, at.current_epoch)
            if options.save_state:
                self._save_state(f"{name}-state")

    def _optimizer_step(self, order: list[int]) -> None:
        """As many batches as gradients are accumulated over, fewer at the end of an epoch, and one step."""
        at, losses, count = self.at, [], self.options.gradient_accumulation_steps
        last = min(at.batch + count, len(order))
        while at.batch < last:
            pictures, captions = self.dataset.batch(order[at.batch])
            # The first batch of an epoch still comes from the last epoch's order: sd-scripts tells its data
            # set of the new one only when that batch is put together (library/train_util.py:6648-6665).
            self.dataset.go_to_epoch(at.current_epoch)
            loss = self._loss(pictures, captions)
            torch.autograd.backward(self.scaler.scale(loss / count))
            losses.append(loss.detach().item())
            at.add(losses[-1])
            if at.batch == last:
                self._update()
            self._log(losses[-1])
        loss_of_step = sum(losses) / len(losses)
        rates = self._rates()
        self.metrics.write(metrics.Step(at.current_step, at.current_epoch, loss_of_step, at.average, rates))

    def _update(self) -> None:
        if self.options.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.lora.parameters(), self.options.max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # less: the gradients overflowed, and the step was skipped
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.current_step += 1

    def _loss(self, pictures: list[Picture], captions: list[str]) -> torch.Tensor:
        """The batch's loss, a scalar: :376-470."""
        options = self.options
        clean = self._latents(pictures) * VAE_SCALE[self.base.kind]
        with torch.set_grad_enabled(self.train_text), self._autocast():
            states, pooled = encode(self.base, captions, options.max_token_length, options.clip_skip)
        noise = torch.randn_like(clean)
        if options.noise_offset:
            noise = noise + options.noise_offset * torch.randn((*clean.shape[:2], 1, 1), device=self.device)
        timesteps = torch.randint(0, 1000, (len(clean),), device="cpu")
        on_device = timesteps.to(self.device)
        noisy = self.noise.add_noise(clean, noise, on_device)
        extra = None
        if pooled is not None:  # SDXL, which casts what it is given: sdxl_train_network.py:162-179
            noisy, states, pooled = (tensor.to(self.dtype) for tensor in (noisy, states, pooled))
            sizes = [(*p.size[::-1], *p.crop[::-1], *p.bucket[::-1]) for p in pictures]
            extra = {"text_embeds": pooled, "time_ids": torch.tensor(sizes, device=self.device)}
        with self._autocast():
            predicted = self.base.unet(noisy, on_device, states, added_cond_kwargs=extra).sample
        loss = functional.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
        if options.min_snr_gamma:  # library/custom_train_functions.py:64-72
            kept = self.noise.alphas_cumprod.cpu()[timesteps]
            ratio = (kept.sqrt() / (1 - kept).sqrt()) ** 2
            loss = loss * (ratio.clamp(max=options.min_snr_gamma) / ratio).to(self.device)
        return loss.mean()

    def _latents(self, pictures: list[Picture]) -> torch.Tensor:
        if self.options.cache_latents:
            return torch.stack([p.latent for p in pictures if p.latent is not None]).to(self.device)
        groups = batches(pictures, self.options.vae_batch_size)
        return torch.cat([latents(group, self.base.vae, self.device) for group in groups]).nan_to_num(0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _optimizer(self) -> tuple[list[str], torch.optim.AdamW]:
        """AdamW and the names of its groups: a part without a rate has none. networks/lora.py:1164-1237"""
        options, default = self.options, self.options.learning_rate
        parts = {
            "textencoder": (self.lora.text, default if options.text_lr is None else options.text_lr),
            "unet": (self.lora.unet, default if options.unet_lr is None else options.unet_lr),
        }
        parts = {name: (modules, rate) for name, (modules, rate) in parts.items() if modules and rate}
        groups = [{"params": list(torch.nn.ModuleList(m).parameters()), "lr": r} for m, r in parts.values()]
        return list(parts), torch.optim.AdamW(groups, lr=default, **options.optimizer_kwargs)

    def _rates(self) -> dict[str, float]:
        return dict(zip(self.groups, map(float, self.scheduler.get_last_lr()), strict=True))

    def _log(self, loss: float) -> None:
        """One point a batch; each rate under its name, and once more under an older one: :85-110."""
        values = {"loss/current": loss, "loss/average": self.at.average}
        for number, (name, rate) in enumerate(self._rates().items()):
            older = f"group{number}" if number or not self.train_text else "textencoder"
            values |= {f"lr/{name}": rate, f"lr/{older}": rate}
        self._write(values, self.at.current_step)

    def _write(self, values: dict[str, float], x: int) -> None:
        for tag, value in values.items():
            if self.events:
                self.events.add_scalar(tag, value, x)

    def _save_between_steps(self, stop: Stop) -> None:
        options, at = self.options, self.at
        name = f"{options.output_name or 'at'}-step{at.current_step:08d}"
        saving = options.save_every_n_steps and at.current_step % options.save_every_n_steps == 0
        stopping = stop.asked and at.current_step < self.steps
        if saving:
            self._save_lora(name, at.current_epoch - 1)
        if saving and options.save_state:
            self._save_state(f"{name}-state")
        elif stopping or self.timer.due:
            self._save_unasked(f"{name}-state")
        if stopping:
            _say(f"stopped after step {at.current_step}/{self.steps}")
            raise SystemExit(143)

    def _save_lora(self, name: str, epoch: int) -> Path:
        path = Path(self.options.output_dir, f"{name}.safetensors")
        _say(f"saving {path.name}")
        of_file = metadata.of_file(self.base.kind, self.options, self.at.current_step, epoch)
        precision = self.options.save_precision
        self.lora.save(path, self.metadata | of_file, _DTYPES[precision] if precision else None)
        return path

    def _save_unasked(self, name: str) -> None:
        """A state that nobody asked for. Without it training goes on: its disk may be full."""
        folder = states.folder(self.options.output_dir) / name
        try:
            self._save_state(name, folder)
            self.timer.saved(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's, of a full disk
            _say(f"the state {name} could not be saved: {error}")
            self.timer.restart()

    def _save_state(self, name: str, folder: Path | None = None) -> None:
        _say(f"saving state {name}")
        optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        schedule = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        parts = {"optimizer": optimizer, "scheduler": schedule}
        folder = folder or Path(self.options.output_dir, name)
        state.save(folder, self.at, self.lora.state_dict(), parts, self.events)

    def _fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on from."""
        pictures = [(*p.path.parts[-2:], p.repeats, *p.bucket) for p in self.dataset.pictures]
        data = hashlib.sha256(repr(pictures).encode()).hexdigest()[:16]
        same = ("network_dim", "network_alpha", "train_batch_size", "gradient_accumulation_steps", "seed")
        values = {name: getattr(self.options, name) for name in same}
        return {"kind": self.base.kind, "the trained parts": self.groups, "the data set": data, **values}


def _schedule(options: Options, steps: int) -> Callable[[int], float]:
    """The factor on the learning rates after `step` steps; library/train_util.py:5265-5400, transformers'."""
    given = options.lr_warmup_steps or 0
    warmup = int(given * steps) if isinstance(given, float) else given

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if options.lr_scheduler != "cosine":
            return 1.0
        progress = (step - warmup) / max(1, steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))

    return factor
