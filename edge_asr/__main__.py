"""`python -m edge_asr` is `edge-asr`."""

from edge_asr.cli import main

main()
