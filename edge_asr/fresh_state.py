"""A daemon for a show or a measurement: it shares the engines, and neither what was chosen nor what was said."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_asr.config import Config
from edge_asr.config_mqtt import HermesConfig, HomeAssistantConfig
from edge_asr.config_server import FunasrConfig, HttpConfig, WyomingConfig

ENGINES = "engines"


@contextmanager
def fresh_state(config: Config) -> Iterator[Config]:
    """Yield the configuration with a `state_dir` for this once, which has the engines of the real one.

    The outbox is in there, nobody is told of the appliance in the language of Home Assistant or Hermes, and no port is
    open: the appliance itself may run beside it.
    """
    engines = config.state_dir.absolute() / ENGINES
    with contextlib.suppress(OSError):  # where nothing can be kept, an engine is built for this once
        engines.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edge_asr-state-") as folder:
        if engines.is_dir():
            (Path(folder) / ENGINES).symlink_to(engines, target_is_directory=True)
        yield config.model_copy(
            update={
                "state_dir": Path(folder),
                "outbox": config.outbox.model_copy(update={"file": None}),
                "home_assistant": HomeAssistantConfig(enabled=False),
                "hermes": HermesConfig(),
                "http": HttpConfig(enabled=False),
                "wyoming": WyomingConfig(),
                "funasr": FunasrConfig(),
            }
        )
