"""Which launch settings a kernel tries: a few on a GPU, the first alone under Triton's interpreter.

On a GPU the fastest is found once for each key and kept in Triton's cache folder, so that a second process does not
measure again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton


def interpreted() -> bool:
    """Whether kernels defined now run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def tuned(configs: Sequence[triton.Config], key: Sequence[str], restore: Sequence[str] = ()) -> Callable[[Any], Any]:
    """``triton.autotune`` over ``configs``, its results cached.

    ``key`` names the arguments that make a case; ``restore`` those that a run changes and the next must find unchanged.
    """
    if interpreted():
        return triton.autotune(configs=[configs[0]], key=list(key))
    kept = list(restore) or None
    return triton.autotune(configs=list(configs), key=list(key), restore_value=kept, cache_results=True)
