"""Lets sd-scripts run in several processes on a CPU, on narrow base models. Put this folder on PYTHONPATH.

On GPUs accelerate leaves a model that is not trained as it is; on CPUs it wraps it for distributed training,
which fails (accelerate 1.6.0, accelerator.py, prepare_model).
"""

import runpy
from pathlib import Path
from typing import Any

from accelerate import Accelerator

runpy.run_path(str(Path(__file__).parents[3] / "demo" / "narrow" / "sitecustomize.py"))

_prepare = Accelerator.prepare_model


def prepare_model(self: Any, model: Any, *arguments: Any, **named: Any) -> Any:
    """Wrap only what is trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        named["evaluation_mode"] = True
    return _prepare(self, model, *arguments, **named)


Accelerator.prepare_model = prepare_model
