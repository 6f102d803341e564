"""Finds the repository and the workspace's packages, without importing any of them."""

import importlib.machinery
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from wf_deployer.errors import UserError

INSTALL = "uv sync --all-packages"
"""The command that installs every package of the workspace, run in the repository."""

TRAINING_SCRIPT = "scripts/train_lightning.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package of the workspace: the name it is installed as, and the name it is imported and started (`-m`) as."""

    distribution: str
    module: str


PACKAGES = (
    Package(distribution="bitnet-arch", module="bitnet_arch"),
    Package(distribution="data-handler", module="data_handler"),
    Package(distribution="wrinklefree", module="wrinklefree"),
    Package(distribution="wrinklefree-inference", module="wrinklefree_inference"),
    Package(distribution="wrinklefree-eval", module="wrinklefree_eval"),
    Package(distribution="wf-deployer", module="wf_deployer"),
)


def is_importable(module: str) -> bool:
    """Whether a top-level module can be imported; nothing is imported."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a bare folder of that name has no origin


def is_runnable(module: str) -> bool:
    """Whether `python -m module` can start; nothing is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or spec.submodule_search_locations is None:
        return False
    return importlib.machinery.PathFinder.find_spec(f"{module}.__main__", list(spec.submodule_search_locations)) is not None


def require_runnable(module: str) -> None:
    """Check that a package can be started.

    Raises:
        UserError: naming the package and the command that installs it.
    """
    distribution = next((package.distribution for package in PACKAGES if package.module == module), module)
    if not is_importable(module):
        raise UserError(f"{distribution} is not installed here: run `{INSTALL}` in the repository")
    if not is_runnable(module):
        raise UserError(
            f"the {distribution} that is installed here has no command to start: update the repository and run `{INSTALL}`"
        )


def find_repository(start: Path | None = None) -> Path | None:
    """Return the nearest checkout at or above `start` (default: the current folder), else the one that holds this file, if any."""
    try:
        origin = (start or Path.cwd()).absolute()
    except FileNotFoundError:  # the current folder was deleted
        origin = Path(__file__).absolute()
    return next((folder for folder in [origin, *origin.parents, *Path(__file__).absolute().parents] if is_repository(folder)), None)


def is_repository(folder: Path) -> bool:
    """Whether a folder is the root of a checkout."""
    return (folder / "uv.lock").is_file() and (folder / "packages" / "training" / "pyproject.toml").is_file()
