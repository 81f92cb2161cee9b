"""Benchmarks against what a user would pick instead of us."""
