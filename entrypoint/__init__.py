"""The job, as it runs inside the container: from a request to a published LoRA."""

__version__ = "0.1.0"
