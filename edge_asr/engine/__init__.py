"""From a bundle to an engine: the networks that this very machine runs."""
