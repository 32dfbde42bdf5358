"""Presets: one TOML a GPU."""
