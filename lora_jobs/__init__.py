"""The client: from a laptop to a SageMaker training job, and back. Nothing in the job imports it.

from lora_jobs import JobFile, submit

submitted = submit(Path("job.toml"))
"""

from typing import TYPE_CHECKING, Any

from lora_jobs.submit import Submitted, submit  # a module with a function of its name: see below

if TYPE_CHECKING:
    from lora_jobs.job_file import JobFile as JobFile

# The import system names a module in its package when it is first imported. It is imported above, so from
# then on `submit` is the function; importlib.import_module still finds the module. What costs time is
# imported by the functions themselves: `lora --help` is to answer at once.
__all__ = ["JobFile", "Submitted", "submit"]


def __getattr__(name: str) -> Any:
    if name == "JobFile":  # when it is asked for: pydantic takes a while
        from lora_jobs.job_file import JobFile  # noqa: PLC0415

        return JobFile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
