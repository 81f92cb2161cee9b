"""edge_asr: an always-on speech appliance: microphone in, transcripts out over MQTT, within a budget."""

import os

__version__ = "0.1.0"

# From 1.29 on, onnxruntime reports its use to Microsoft and keeps a device id, unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
