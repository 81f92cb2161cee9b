"""The speech server: the engine for the machines around it, in the dialects that they speak."""
