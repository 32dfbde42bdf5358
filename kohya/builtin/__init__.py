"""A small trainer of the shape of sd-scripts' train_network, for where sd-scripts cannot be had.

    python -m kohya.builtin sd15|sdxl --config_file=merged.toml

It follows sd-scripts v0.10.1 number by number: the same LoRA targets, key names, initialisation and
order of random draws. What it does not have, it refuses by name (`kohya.builtin.options`).
"""


class BuiltinError(ValueError):
    """A failure that was foreseen; its text is a plain sentence."""
