"""What is done with a job: shown, run here, or printed as a task for a cloud."""

import shlex
import sys

from wf_deployer.backends.local import run_local
from wf_deployer.errors import UserError
from wf_deployer.locate import require_runnable
from wf_deployer.render import render_skypilot
from wf_deployer.spec import Job


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the argv that starts a package of the workspace with this interpreter."""
    return (sys.executable, "-m", module, *arguments)


def execute(job: Job, *, dry_run: bool = False, verbose: bool = False) -> int:
    """Run a job, or print what would run; return the exit code.

    A dry run prints a local job's argv, quoted for a shell, or a cloud job's task file. `verbose` prints the argv to stderr.

    Raises:
        UserError: if the job's package is missing, or the job is for a cloud and this is no dry run.
    """
    shown = display(job.command)
    if verbose:
        print(f"+ {shown}", file=sys.stderr, flush=True)
    if job.resources.cloud != "local":
        if not dry_run:
            raise UserError(
                f"launching on {job.resources.cloud} from wf is not there yet: "
                "print the task with --dry-run and give it to `sky launch` or `sky jobs launch`"
            )
        print(render_skypilot(job), end="")
        return 0
    if dry_run:
        print(shown)
        return 0
    if job.command[:2] == (sys.executable, "-m"):
        require_runnable(job.command[2])
    return run_local(job)


def display(command: tuple[str, ...]) -> str:
    """Return a command as a shell would read it back, safe to print even where a word is not text."""
    return shlex.join(command).encode("utf-8", "backslashreplace").decode()
