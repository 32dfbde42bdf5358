"""Presets: one TOML a kind of base model; gpu/ has one a GPU."""
