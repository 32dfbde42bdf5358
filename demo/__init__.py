"""The whole job on an embedded default: `make demo`."""
