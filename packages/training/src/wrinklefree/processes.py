"""Which of several processes this one is, before Lightning has begun."""

import os


def is_first() -> bool:
    """Whether this process is the one that writes: Lightning and its launchers number the others in their environment."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0
