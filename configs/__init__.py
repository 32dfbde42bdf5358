"""Presets: one TOML a kind of base model."""
