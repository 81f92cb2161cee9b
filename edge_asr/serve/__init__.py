"""The speech server: the engine for the machines around it, in the dialects that they speak."""

import warnings

with warnings.catch_warnings():  # wyoming still looks for a module that Python has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    import wyoming.audio  # noqa: F401
