"""States that are saved unasked, so that a run that is broken off loses minutes: when, where, which are kept.

A trainer writes them to the folder that KOHYA_STATES names, else to its output_dir. Whoever started it may
take one from there as soon as it has its name.
"""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "KOHYA_STATE_EVERY_MINUTES"
FOLDER = "KOHYA_STATES"
STEP = "train_state.json"  # sd-scripts' name; holds current_step, the optimizer steps that are done
LOGGED = "event_log.json"  # in a state: {"bytes": n}, how long the event log was when it was saved
KEPT_SECONDS = 2.0  # until a state that is saved has been kept, by whoever started the trainer
FLUSH_SECONDS = 10.0  # after which what was logged is on disk

# Options that change how fast a run is, or what is written beside the LoRA, but not what is learned.
NOT_LEARNED = frozenset(
    {
        "async_upload", "cache_latents_to_disk", "console_log_level", "console_log_simple",
        "cpu_offload_checkpointing", "ddp_gradient_as_bucket_view", "ddp_static_graph", "ddp_timeout",
        "dynamo_backend", "gradient_checkpointing", "highvram", "log_prefix", "log_tracker_name", "log_with",
        "lowram", "max_data_loader_n_workers", "mem_eff_attn", "persistent_data_loader_workers",
        "sample_at_first", "sample_every_n_epochs", "sample_every_n_steps", "sample_prompts",
        "sample_sampler", "save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs",
        "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state", "save_n_epoch_ratio",
        "save_state", "save_state_on_train_end", "sdpa", "skip_cache_check", "skip_until_initial_step",
        "torch_compile", "training_comment", "vae_batch_size", "wandb_api_key", "wandb_run_name", "xformers",
    }
)  # fmt: skip


def folder(output_dir: str | Path) -> Path:
    """Where a state goes that is saved unasked."""
    return Path(os.environ.get(FOLDER) or output_dir)


def note_log(state: Path, writer: Any) -> None:
    """Write into a state how long the event log of `writer`, torch's SummaryWriter, is by now."""
    writer.flush()
    (file,) = Path(writer.log_dir).glob("events.out.tfevents.*")
    (state / LOGGED).write_text(json.dumps({"bytes": file.stat().st_size}), encoding="utf-8")


class Timer:
    """Says when the next state is due. Without KOHYA_STATE_EVERY_MINUTES, or at 0, none ever is.

    That is sooner than so many minutes after the last one, by what it takes until a state is kept: a run that
    is killed loses no more than those minutes.
    """

    def __init__(self) -> None:
        self._seconds = 60 * float(os.environ.get(VARIABLE, "0"))
        self._since = self._begun = time.monotonic()
        self._took = 0.0  # seconds, to save the last one
        self._last: Path | None = None

    @property
    def due(self) -> bool:
        self._begun = time.monotonic()
        sooner = min(self._took + KEPT_SECONDS, self._seconds / 2)
        return 0 < self._seconds <= self._begun - self._since + sooner

    def restart(self) -> None:
        """The time begins anew."""
        self._since = time.monotonic()

    def saved(self, folder: Path) -> None:
        """A state is whole: the one before it is not needed any more, and the time begins anew."""
        if self._last is not None and self._last != folder:
            hidden = self._last.with_name(f".{self._last.name}.partial")
            with suppress(FileNotFoundError):  # it was taken
                # without its name first: what is half removed must not look like a state
                shutil.rmtree(self._last.rename(hidden))
        self._last = folder
        self._took = time.monotonic() - self._begun
        self.restart()
