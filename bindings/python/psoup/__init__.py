"""libpsoup from Python: personal language models from one base.

One frozen base, one small LoRA adapter per preference, and a *mix* of them per row of the batch: a user's
personal soup costs no merge and no memory. `psoup.Model` and `psoup.Session` run it, `psoup.PPO` and
others train it, `psoup.Merger` and `psoup.merge` make files and state dicts of it.
"""

from ._abi import Dtype, EarlyStop, Finish, LogLevel, MergeMethod, MergePeer, MixMethod, RopeScaling, Schedule, Status
from ._library import Bar
from .arrays import View, empty, empty_like, packed, view
from .best import *  # noqa: F403
from .comm import *  # noqa: F403
from .context import *  # noqa: F403
from .data import *  # noqa: F403
from .direct import *  # noqa: F403
from .errors import *  # noqa: F403
from .evaluation import *  # noqa: F403
from .history import *  # noqa: F403
from .merging import *  # noqa: F403
from .model import *  # noqa: F403
from .policies import *  # noqa: F403
from .rewards import *  # noqa: F403
from .supervised import *  # noqa: F403
from .tokenizer import *  # noqa: F403

__version__ = version()  # noqa: F405
