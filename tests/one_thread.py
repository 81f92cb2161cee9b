"""Loads NumPy with one thread: of several, most of the time would go into waiting for each other in small products."""

import pytest

with pytest.MonkeyPatch.context() as _patch:  # processes that tests start have as many as ever
    _patch.setenv("OPENBLAS_NUM_THREADS", "1")
    import numpy as np

__all__ = ["np"]
