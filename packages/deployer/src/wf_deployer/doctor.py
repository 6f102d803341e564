"""What is installed, what is missing, and how to get it. Looks at metadata and files; imports nothing that it reports on."""

import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from wf_deployer.locate import INSTALL, PACKAGES, Package, find_repository, is_importable, is_runnable

_ALWAYS = ("torch", "transformers", "pytorch-lightning", "lm-eval", "xllamacpp")
_EXTRAS = {
    "sglang": ("sglang", "GPU serving"),
    "skypilot": ("cloud", "launching tasks in a cloud"),
}
_GIB = 2**30
_SUBMODULE = "extern/BitNet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked for.
        group: `machine`, `package`, `dependency`, `optional` or `network`.
        required: whether `wf`'s commands need it.
        ok: whether it is there, and new enough.
        found: what was found, in words.
        remedy: the command or step that provides it; empty if there is none to give.
    """

    name: str
    group: str
    required: bool
    ok: bool
    found: str
    remedy: str = ""


def diagnose(*, network: bool = False) -> list[Check]:
    """Look at everything; a hub is asked only if `network` is true."""
    checks = [
        check_python(),
        check_tool("uv", "python3 -m pip install uv"),
        check_tool("git", "install git with your system's packages"),
    ]
    checks += [check_accelerator(), *check_disks()]
    checks += [check_package(package) for package in PACKAGES]
    checks += check_dependencies(package.distribution for package in PACKAGES)
    checks += [check_extra(name) for name in _EXTRAS]
    checks += [check_wandb_key(), check_submodule()]
    if network:
        checks.append(check_hub())
    return checks


def is_healthy(checks: Sequence[Check]) -> bool:
    """Whether all that is required is there."""
    return all(check.ok for check in checks if check.required)


def check_python() -> Check:
    """Python 3.11 or newer."""
    return Check(
        name="python",
        group="machine",
        required=True,
        ok=sys.version_info >= (3, 11),
        found=f"{platform.python_version()} ({sys.executable})",
        remedy="uv python install 3.11",
    )


def check_tool(name: str, remedy: str) -> Check:
    """A program on the PATH that answers `--version`."""
    path = shutil.which(name)
    found = "not on the PATH"
    if path is not None:
        try:
            answer = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL
            )
            first = (answer.stdout or answer.stderr).strip().splitlines()[:1]
            found = first[0] if first and answer.returncode == 0 else f"{path} does not answer --version"
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            found = f"{path} does not answer --version"
    ok = path is not None and not found.endswith("does not answer --version")
    return Check(name=name, group="machine", required=False, ok=ok, found=found, remedy=remedy)


def check_accelerator(root: Path = Path("/")) -> Check:
    """A device node or driver of an accelerator below `root`; torch is not asked."""
    driver = root / "proc/driver/nvidia/version"
    cards = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    if cards or driver.exists() or (root / "dev/dxg").exists():
        number = re.search(r"\b[0-9]+\.[0-9.]+\b", _read(driver))
        found = f"NVIDIA: {', '.join(cards) or 'driver, no card visible'}" + (f", driver {number[0]}" if number else "")
    elif (root / "dev/kfd").exists():
        found = "AMD: /dev/kfd"
    elif sys.platform == "darwin" and platform.machine() == "arm64":
        found = "Apple GPU"
    else:
        return Check(
            name="accelerator",
            group="machine",
            required=False,
            ok=False,
            found="none: everything runs on the CPU",
            remedy="none needed for small models; for an NVIDIA card install its driver",
        )
    return Check(name="accelerator", group="machine", required=False, ok=True, found=found)


def check_disks() -> list[Check]:
    """Free space where results and downloaded models go."""
    return [
        _check_disk("disk (here)", Path(), 2 * _GIB, "free some space, or work in another folder"),
        _check_disk("disk (model cache)", hub_cache(), 5 * _GIB, "free some space, or set HF_HOME to another disk"),
    ]


def hub_cache() -> Path:
    """Where downloaded models are kept: HF_HUB_CACHE, else HF_HOME/hub, else below the user's cache folder."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).expanduser() / "huggingface" / "hub"


def check_package(package: Package) -> Check:
    """A package of the workspace: installed, importable and startable."""
    installed = _version(package.distribution)
    if installed is None:
        ok, found = False, "not installed"
    elif not is_importable(package.module):
        ok, found = False, f"{installed}, but {package.module} cannot be imported"
    elif not is_runnable(package.module):
        ok, found = False, f"{installed}, without its command"
    else:
        ok, found = True, installed
    return Check(name=package.distribution, group="package", required=True, ok=ok, found=found, remedy=INSTALL)


def check_dependencies(distributions: Iterable[str]) -> list[Check]:
    """What the given distributions ask for, each once, with the version that is here; extras are left out."""
    wanted: dict[str, list[str]] = {name: [] for name in _ALWAYS}
    ours = {_normal(package.distribution) for package in PACKAGES}
    for distribution in distributions:
        for name, specifier in _requirements(distribution):
            if name not in ours:
                wanted.setdefault(name, []).append(specifier)
    checks = []
    for name, specifiers in sorted(wanted.items()):
        installed = _version(name)
        specifier = ",".join(dict.fromkeys(part for text in specifiers for part in text.split(",") if part))
        ok = installed is not None and satisfies(installed, specifier)
        found = installed or "not installed"
        if installed is not None and not ok:
            found = f"{installed}, but {specifier} is needed"
        checks.append(Check(name=name, group="dependency", required=True, ok=ok, found=found, remedy=INSTALL))
    return checks


def check_extra(name: str) -> Check:
    """An optional distribution that an extra of the workspace brings."""
    extra, purpose = _EXTRAS[name]
    installed = _version(name)
    return Check(
        name=f"{name} ({purpose})",
        group="optional",
        required=False,
        ok=installed is not None,
        found=installed or "not installed",
        remedy=f"{INSTALL} --extra {extra}",
    )


def check_wandb_key() -> Check:
    """Whether a key for wandb is there, in WANDB_API_KEY or in netrc; the key itself is never shown."""
    here = bool(os.environ.get("WANDB_API_KEY")) or _netrc_knows(_wandb_host())
    found = "yes" if here else "no: runs are logged offline"
    return Check(name="wandb key", group="optional", required=False, ok=here, found=found, remedy="wandb login")


def check_submodule() -> Check:
    """Whether the optional submodule is checked out in the repository."""
    repository = find_repository()
    folder = repository / _SUBMODULE if repository is not None else None
    ok = folder is not None and folder.is_dir() and any(folder.iterdir())
    found = str(folder) if ok else "no repository here" if folder is None else "not checked out"
    return Check(
        name=_SUBMODULE, group="optional", required=False, ok=ok, found=found, remedy=f"git submodule update --init {_SUBMODULE}"
    )


def check_hub(timeout: float = 5.0) -> Check:
    """Ask the model hub (HF_ENDPOINT, else huggingface.co) for its front page."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    ok, found = False, f"{endpoint} is no http address"
    if urlsplit(endpoint).scheme in ("http", "https"):
        try:
            with urlopen(Request(endpoint, method="HEAD"), timeout=timeout):
                ok, found = True, f"{endpoint} answers"
        except HTTPError as error:  # a refusal is an answer, unless the server is ill
            ok, found = error.code < 500, f"{endpoint} answers {error.code}"
        except (OSError, ValueError) as error:
            found = f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})"
    return Check(
        name="model hub",
        group="network",
        required=False,
        ok=ok,
        found=found,
        remedy="check the connection or HF_ENDPOINT; models in directories and packaged ones work without a hub",
    )


def satisfies(installed: str, specifier: str) -> bool:
    """Compare a version with a specifier such as `>=5.12,<6`, by release numbers; clauses of other kinds are taken to hold."""
    for clause in filter(None, (part.strip() for part in specifier.split(","))):
        match = re.fullmatch(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", clause)
        if match is None:
            continue
        here, there = _release(installed), _release(match[2])
        width = max(len(here), len(there))
        here, there = here + (0,) * (width - len(here)), there + (0,) * (width - len(there))
        holds = {">=": here >= there, "<=": here <= there, "==": here == there, "<": here < there, ">": here > there}
        if not holds[match[1]]:
            return False
    return True


def _release(text: str) -> tuple[int, ...]:
    numbers = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def _requirements(distribution: str) -> list[tuple[str, str]]:
    """The (normalised name, specifier) pairs that a distribution needs everywhere: none of its extras, no platform's own."""
    try:
        texts = requires(distribution) or []
    except PackageNotFoundError:
        return []
    pairs = []
    for text in texts:
        requirement, _, marker = text.partition(";")
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*\(?([^)]*)\)?", requirement)
        if match is not None and not marker.strip():
            pairs.append((_normal(match[1]), match[3].strip()))
    return pairs


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _check_disk(name: str, folder: Path, needed: int, remedy: str) -> Check:
    try:
        folder = folder.absolute()
        there = next(path for path in [folder, *folder.parents] if path.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name=name, group="machine", required=False, ok=False, found=f"{folder}: {error.strerror}", remedy=remedy)
    found = f"{free / _GIB:.1f} GiB free at {folder}"
    return Check(name=name, group="machine", required=False, ok=free >= needed, found=found, remedy=remedy)


def _wandb_host() -> str:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"


def _netrc_knows(host: str) -> bool:
    files = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if host in netrc.netrc(str(file)).hosts:
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
