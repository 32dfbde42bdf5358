"""Lets the unmodified sd-scripts load the demo's narrow base models. Put this folder on PYTHONPATH.

sd-scripts has the widths of the real models as constants of its modules (v0.10.1: original_unet.py:123-137,
sdxl_original_unet.py:40-45, model_util.py:28-46 and 1055, sdxl_model_util.py:205). They are replaced in the
process as each module is imported; no file is touched.
"""

import importlib.abc
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TEXT_WIDTH = 64
CONSTANTS: dict[str, dict[str, Any]] = {
    "library.original_unet": {
        "BLOCK_OUT_CHANNELS": (32, 64, 128, 128),
        "TIMESTEP_INPUT_DIM": 32,
        "TIME_EMBED_DIM": 128,
    },
    "library.sdxl_original_unet": {"MODEL_CHANNELS": 32, "TIME_EMBED_DIM": 128, "ADM_IN_CHANNELS": 1600},
    "library.model_util": {
        "UNET_PARAMS_MODEL_CHANNELS": 32,
        "UNET_PARAMS_CONTEXT_DIM": TEXT_WIDTH,
        "VAE_PARAMS_CH": 32,
    },
    "library.sdxl_model_util": {},
}


def narrow(module: ModuleType) -> None:
    """Put narrow widths into one of sd-scripts' modules."""
    for name, value in CONSTANTS[module.__name__].items():
        setattr(module, name, value)
    if hasattr(module, "CLIPTextConfig"):
        config = module.CLIPTextConfig

        def narrow_config(**values: Any) -> Any:
            width = {
                "hidden_size": TEXT_WIDTH,
                "projection_dim": TEXT_WIDTH,
                "intermediate_size": 4 * TEXT_WIDTH,
            }
            return config(**{**values, **width, "num_attention_heads": 1})

        module.CLIPTextConfig = narrow_config  # type: ignore[attr-defined]
    if module.__name__ == "library.sdxl_original_unet":
        original = module.Transformer2DModel

        # The name counts: sd-scripts finds a LoRA's targets by the names of classes.
        class Transformer2DModel(original):  # type: ignore[misc, valid-type]
            def __init__(self, **values: Any) -> None:
                super().__init__(**{**values, "cross_attention_dim": 2 * TEXT_WIDTH})

        module.Transformer2DModel = Transformer2DModel  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in CONSTANTS else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_narrow(module: ModuleType) -> None:
            run(module)
            narrow(module)

        spec.loader.exec_module = run_and_narrow  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
