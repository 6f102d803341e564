"""One behaviour a file."""

from wrinklefree.callbacks.checkpoints import Checkpoints, newest_checkpoint
from wrinklefree.callbacks.heldout import Heldout
from wrinklefree.callbacks.interruption import Interruption
from wrinklefree.callbacks.metrics import Metrics, read_metrics
from wrinklefree.callbacks.mixing import Mixing
from wrinklefree.callbacks.progress import Progress
from wrinklefree.callbacks.shares import Shares

__all__ = ["Checkpoints", "Heldout", "Interruption", "Metrics", "Mixing", "Progress", "Shares", "newest_checkpoint", "read_metrics"]
