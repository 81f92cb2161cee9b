"""edge_asr: an always-on speech appliance: microphone in, transcripts out over MQTT, within a budget."""

__version__ = "0.1.0"
