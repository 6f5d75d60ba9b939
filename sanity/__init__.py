"""Does an explanation of a neural network depend on the network? Sanity checks for saliency maps."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanity.attributions import METHODS, Inputs, Method
    from sanity.plan import Plan
    from sanity.run import check
    from sanity.summary import summarize, verdicts

# OpenMP threads that spin at barriers make a network ten times slower where another process wants the core;
# waiting passively costs an idle machine nothing. Read when torch is loaded, so it is set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["METHODS", "Inputs", "Method", "Plan", "__version__", "check", "summarize", "verdicts"]

_HOMES = {
    "check": "sanity.run",
    "Plan": "sanity.plan",
    "METHODS": "sanity.attributions",
    "Method": "sanity.attributions",
    "Inputs": "sanity.attributions",
    "summarize": "sanity.summary",
    "verdicts": "sanity.summary",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `python -m sanity.run` must not find its module imported already, and a stored
    # run is read on machines without torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sanity' has no attribute {name!r}")
