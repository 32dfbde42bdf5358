"""The client: from a laptop to a SageMaker training job, and back. Nothing in the job imports it.

from lora_jobs import JobFile, fetch, submit, watch

submitted = submit(Path("job.toml"))
for status in watch(submitted.name):
    print(status.status, status.progress.step)
fetch(submitted.name, Path("loras"))
"""

from typing import TYPE_CHECKING, Any

from lora_jobs.board import board  # modules with functions of their names: see below
from lora_jobs.fetch import Fetched, fetch
from lora_jobs.jobs import Line, Progress, Status, jobs
from lora_jobs.logs import logs
from lora_jobs.stop import stop
from lora_jobs.submit import Submitted, submit
from lora_jobs.watch import watch

if TYPE_CHECKING:
    from lora_jobs.job_file import JobFile as JobFile

# The import system names a module in its package when it is first imported. It is imported above, so from
# then on `submit` is the function; importlib.import_module still finds the module. What costs time is
# imported by the functions themselves: `lora --help` is to answer at once.
__all__ = [
    "Fetched",
    "JobFile",
    "Line",
    "Progress",
    "Status",
    "Submitted",
    "board",
    "fetch",
    "jobs",
    "logs",
    "stop",
    "submit",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "JobFile":  # when it is asked for: pydantic takes a while
        from lora_jobs.job_file import JobFile  # noqa: PLC0415

        return JobFile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
