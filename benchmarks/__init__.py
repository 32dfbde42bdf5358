"""Measurements that a person starts: `make full-size`."""
