"""A training loop that uses accelerate as sd-scripts' does, for the launcher to run. Trains one number.

It keeps its pictures' numbers in the file `seen`, and sends itself SIGTERM in the step `stop_in`.
"""

import json
import math
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset[torch.Tensor]):
    epoch = 0

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(100 * self.epoch + index))

    def set_current_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Network(torch.nn.Linear):
    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        save_file(
            {key: value.to(dtype or value.dtype) for key, value in self.state_dict().items()}, file, metadata
        )


def train(options: dict[str, Any]) -> None:
    output, accumulation = Path(options["output_dir"]), options["gradient_accumulation_steps"]
    torch.manual_seed(0)
    made = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulation, log_with="tensorboard", project_dir=str(output)
    )
    network, pictures = Network(1, 1), Pictures()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9)
    network, optimizer, loader = made.prepare(network, optimizer, DataLoader(pictures, shuffle=True))
    per_epoch = math.ceil(len(loader) / accumulation)
    steps, step, steps_from_state = 3 * per_epoch, 0, None

    def save_hook(_models: Any, _weights: Any, folder: str) -> None:
        Path(folder, "train_state.json").write_text(json.dumps({"current_step": step}))

    def load_hook(_models: Any, folder: str) -> None:
        nonlocal steps_from_state
        steps_from_state = json.loads(Path(folder, "train_state.json").read_text())["current_step"]

    made.register_save_state_pre_hook(save_hook)
    made.register_load_state_pre_hook(load_hook)
    if "resume" in options:
        made.load_state(options["resume"])
    made.print(f"  num batches per epoch / 1: {len(loader)}\n  num epochs / 2: 3")
    made.print(f"  total optimization steps / 3: {steps}")
    made.init_trackers("network_train")
    initial, first = steps_from_state or 0, 0
    if initial > 0:
        assert steps > initial
        initial *= accumulation
        first = initial // per_epoch
        for _ in range(first):
            initial -= len(loader)
    step = initial
    for epoch in range(first, 3):
        made.print(f"\nepoch {epoch + 1}/3\n")
        rest = made.skip_first_batches(loader, initial - 1) if initial > 0 else None
        passed_over, initial = initial > 0, 0
        for batch in rest or loader:
            if passed_over:
                passed_over = False
                continue
            with made.accumulate(network):
                loss = network(batch.view(-1, 1) + torch.rand(1)).mean()
                made.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            with (output / "seen").open("a") as seen:
                seen.write(f"{batch.item():.0f} {loss.item()}\n")
            pictures.set_current_epoch(epoch + 1)
            if made.sync_gradients:
                step += 1
                if step == options["stop_in"]:
                    os.kill(os.getpid(), signal.SIGTERM)
            made.get_tracker("tensorboard").log({"loss/current": loss.item(), "loss/average": 0.5}, step=step)
            if step >= steps:
                break
    made.end_training()
    (output / "end").write_text(str(step))


if __name__ == "__main__":
    (argument,) = sys.argv[1:]
    train(tomllib.loads(Path(argument.partition("=")[2]).read_text()))
