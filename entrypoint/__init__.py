"""The job, as it runs inside the container: from a request to a published LoRA."""

from importlib import metadata

try:
    __version__ = metadata.version("sagemaker-kohya")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"
