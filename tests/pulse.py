"""A private PulseAudio with virtual microphones: what is played into a null sink is heard on its monitor."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mosquitto import PATIENCE_S, wait_for

PROGRAMS = ("pulseaudio", "pactl", "paplay")
PLUGIN_FOLDERS = ("/usr/lib", "/usr/local/lib")
MICROPHONE = "virt"
"""The sink whose monitor is the virtual microphone, and the name of that in ALSA."""


def missing_parts() -> list[str]:
    """Return what a test on the virtual microphone needs and is not installed."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not any(next(Path(folder).rglob("libasound_module_pcm_pulse.so"), None) for folder in PLUGIN_FOLDERS):
        missing.append("libasound2-plugins")
    if not any(next(Path(folder).rglob("libportaudio.so.2"), None) for folder in PLUGIN_FOLDERS):
        missing.append("libportaudio2")
    return missing


class PulseServer:
    """PulseAudio in a home of its own, where ALSA's devices lead to it. Only ALSA knows the microphone by `name`."""

    def __init__(self) -> None:
        # Not pytest's folder: the path of a socket may have 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="pulse"))
        self._process: subprocess.Popen[bytes] | None = None
        (self.home / "run").mkdir(mode=0o700)
        settings = self.home / ".config/pulse/client.conf"
        settings.parent.mkdir(parents=True)
        settings.write_text("autospawn = no\n")  # whoever looks for a server that is gone must not start another
        self.name_microphone(MICROPHONE)

    @property
    def environment(self) -> Mapping[str, str]:
        """What leads a program to this server."""
        return {
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "XDG_CONFIG_HOME": str(self.home / ".config"),
            "PULSE_COOKIE": str(self.home / "cookie"),
            "LC_ALL": "C",
        }

    def name_microphone(self, name: str, sink: str = MICROPHONE) -> None:
        """Let ALSA's only device beside the default one be the monitor of `sink`, and be called so."""
        (self.home / ".asoundrc").write_text(
            "pcm.!default { type pulse }\nctl.!default { type pulse }\n"
            f'pcm.{name} {{ type pulse device {sink}.monitor hint {{ show on description "virtual" }} }}\n'
        )

    def start(self, **sinks: tuple[int, int]) -> None:
        """Start, with sinks of these rates and numbers of channels, and return when it answers."""
        modules = [_sink(name, *sound) for name, sound in sinks.items()]
        loads = [f"--load={module}" for module in (*modules, "module-native-protocol-unix")]
        with (self.home / "pulseaudio.log").open("ab") as output:
            self._process = subprocess.Popen(
                ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", *loads],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_for(lambda: self._pactl("info").returncode == 0, "PulseAudio answers")

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None
        for left in (self.home / "run").rglob("*"):  # else the next server takes the one before for running
            if not left.is_dir():
                left.unlink()

    def suspend(self) -> None:
        """Let it hang."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def add_sink(self, name: str = MICROPHONE, rate: int = 16_000, channels: int = 1) -> None:
        """Plug a microphone in."""
        self._do("load-module", *_sink(name, rate, channels).split())

    def remove_sink(self, name: str = MICROPHONE) -> None:
        """Unplug a microphone."""
        modules = self._do("list", "short", "modules").splitlines()
        found = [line.split()[0] for line in modules if f"sink_name={name} " in f"{line} "]
        assert len(found) == 1, modules
        self._do("unload-module", found[0])

    def recordings(self) -> int:
        """Return how many programs record."""
        return len(re.findall(r"^Source Output #", self._do("list", "source-outputs"), re.MULTILINE))

    def play(self, path: Path, sink: str = MICROPHONE) -> subprocess.Popen[bytes]:
        """Begin to play a file into a sink."""
        environment = {**os.environ, **self.environment}
        return subprocess.Popen(["paplay", f"--device={sink}", path], env=environment, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        """End it and forget everything."""
        self.kill()
        shutil.rmtree(self.home)

    def _do(self, *arguments: str) -> str:
        result = self._pactl(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def _pactl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["pactl", *arguments],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )


def _sink(name: str, rate: int, channels: int) -> str:
    return f"module-null-sink sink_name={name} rate={rate} channels={channels}"
