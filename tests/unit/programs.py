"""Programs that stand in for docker and aws: they note their words, and answer as a test says."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TOOLS = "awk bash cat cp env grep ln ls make mkdir mktemp paste rm sh sleep touch"


class Programs:
    """A folder that is the whole PATH of a script: the tools that it needs, and the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"  # where stand-ins keep what they know
        self.home, self.temporary, self._bin = folder / "home", folder / "tmp", folder / "bin"
        for made in (self.state, self.home, self.temporary, self._bin):
            made.mkdir()
        for tool in _TOOLS.split():
            (self._bin / tool).symlink_to(shutil.which(tool) or tool)
        self._log = folder / "log"
        self._log.touch()
        self.environment = {
            "PATH": str(self._bin),
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "STATE": str(self.state),
        }

    def add(self, name: str, body: str) -> None:
        """A program `name`: bash that finds its folder in STATE."""
        # in one piece, for two may run at once
        note = f'words=$(printf \'%s\\x1f\' {name} "$@"); echo "$words" >>{self._log}'
        (self._bin / name).unlink(missing_ok=True)  # it may be a link to the real one
        (self._bin / name).write_text(f'#!/usr/bin/env bash\n{note}\ncd "$STATE"\n{body}')
        (self._bin / name).chmod(0o755)

    def remove(self, name: str) -> None:
        """Take a program away."""
        (self._bin / name).unlink()

    def know(self, **facts: str) -> None:
        """Write what the stand-ins know, a file a fact."""
        for name, text in facts.items():
            (self.state / name).write_text(text)

    def forget(self, *facts: str) -> None:
        """Remove what the stand-ins know."""
        for name in facts:
            (self.state / name).unlink()

    def run(
        self, *command: str, cwd: Path = ROOT, stdin: str = "", **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` to its end."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        """The words of every call of a stand-in, in order."""
        return [line.split("\x1f")[:-1] for line in self._log.read_text().splitlines()]
