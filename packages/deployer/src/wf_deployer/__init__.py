"""The wf command: trains, converts, exports, serves and evaluates, here or in a cloud.

Nothing here imports torch or another package of the workspace: commands are started as processes.
"""

from wf_deployer.errors import UserError
from wf_deployer.render import render_skypilot
from wf_deployer.spec import CLOUDS, Job, Mount, Resources

__all__ = ["CLOUDS", "Job", "Mount", "Resources", "UserError", "render_skypilot"]
