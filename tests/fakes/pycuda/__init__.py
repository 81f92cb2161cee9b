"""A fake of pycuda on the simulated GPU of fake_gpu."""

VERSION_TEXT = "2025.1.2"
