"""`edge-asr mqtt`: what has to be said about a broker from the command line."""

from __future__ import annotations

from edge_asr.config import Config
from edge_asr.forget import Forgetter


def forget(settings: Config) -> None:
    """Take back what the broker keeps of the appliance, and print each topic."""
    device = settings.device_id
    found = Forgetter(settings.mqtt).forget(device, settings.home_assistant.prefix)
    for topic in found.removed:
        print(f"removed {topic}")
    for topic in found.left:
        print(f"left    {topic}: somebody else had this command retained; mosquitto_pub -r -n removes it")
    if not found.removed:
        print(f"nothing is retained of {device} at {settings.mqtt.host}:{settings.mqtt.port}")
    if found.online:
        print(f"{device} is connected, and publishes this again when it connects anew; stop it first, then repeat this")
