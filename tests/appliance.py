"""An appliance: a Debian that systemd boots, in a container without a network, and a stick to install from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bundled import BUNDLE, REPOSITORY

TREE = REPOSITORY / "build" / "systemd" / "tree"
"""Made by scripts/test-systemd."""
PATIENCE_S = 60.0
"""How long a test waits for what must happen; far more than it takes."""
REBOOTED = 133
"""systemd-nspawn leaves the restart to others, and says so with this."""
UNIT = "edge-asr.service"
STATE = Path("var/lib/edge_asr")
CONFIGURATION = Path("etc/edge_asr/config.yaml")
EXTRAS = {
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/asound.conf": "pcm.!default { type pulse }\nctl.!default { type pulse }\n",
    "etc/pulse/client.conf": "default-server = unix:/run/pulse/native\nautospawn = no\n",
    "etc/systemd/system/sound.service": """\
[Unit]
Description=a microphone that hears what is played
[Service]
ExecStart=/usr/bin/pulseaudio --system --disallow-exit --exit-idle-time=-1 --daemonize=no -n \\
  --load="module-null-sink sink_name=virt rate=16000 channels=1" \\
  --load="module-native-protocol-unix auth-anonymous=1 socket=/run/pulse/native"
[Install]
WantedBy=multi-user.target
""",
}
"""What Debian's smallest lacks, and a microphone: PulseAudio for the whole system."""


class Appliance:
    """The container: its files below `root`, its processes through `run`."""

    def __init__(self, root: Path, stick: Path) -> None:
        self.root = root
        self.heard: list[tuple[str, Any]] = []
        """Topic and payload of all that was published since `listen`."""
        self._stick = stick
        self._machine: subprocess.Popen[bytes] | None = None
        self._listening: subprocess.Popen[str] | None = None
        self._ear: threading.Thread | None = None
        self._groups = [folder / f"edge-asr-test-{os.getpid()}" for folder in control_groups()]
        """Its own: another container beside it would have the same ones."""

    def boot(self) -> None:
        """Start the container, and wait for its systemd to have started everything."""
        for group in self._groups:
            group.mkdir()
        entering = "".join(f"echo $$ >{group}/cgroup.procs; " for group in self._groups)
        nspawn = f"systemd-nspawn -q -b -M {self._groups[0].name} --register=no --keep-unit --private-network"
        where = f"-D {self.root} --bind-ro={self._stick}:/media/stick"
        with (self.root.parent / "console.log").open("ab") as console:
            self._machine = subprocess.Popen(
                ["sh", "-ec", f"{entering} exec {nspawn} {where}"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.until(self._leader, "the container")
        self._wait_for_systemd()

    def reboot(self) -> None:
        """Restart the container as its own `systemctl reboot` does."""
        assert self._machine is not None
        self.run("systemctl", "reboot", check=False)
        assert self._machine.wait(PATIENCE_S) == REBOOTED
        self._stop_listening()
        self._remove_groups()
        self.boot()

    def power_off(self) -> None:
        """Stop the container; what still runs is killed."""
        if self._machine is not None and self._machine.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("systemctl", "poweroff", check=False, timeout=10)
                self._machine.wait(10)
            self._machine.kill()
            self._machine.wait()
        self._stop_listening()
        self._remove_groups()

    def run(self, *command: str | Path, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command in the container as root; what it prints is captured."""
        result = subprocess.run(
            self._within(*command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        assert not check or result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result

    def install(self, *options: str, stick: str = "current", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Install from one of the folders of the stick."""
        folder = Path("/media/stick") / stick
        return self.run(folder / "scripts" / "install", "--from", folder, *options, check=check)

    def until(self, condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
        """Return as soon as the condition holds; fail with `what` was waited for, and the journal."""
        give_up_at = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > give_up_at:
                journal = self.journal() if self._leader() else ""
                raise AssertionError(f"waited {patience_s:.0f} s in vain for {what}\n{journal[-3000:]}")
            time.sleep(0.1)

    def show(self, name: str) -> str:
        """Return a property of the service."""
        return self.run("systemctl", "show", "--property", name, "--value", UNIT).stdout.strip()

    @property
    def active(self) -> bool:
        return self.show("ActiveState") == "active"

    @property
    def restarts(self) -> int:
        return int(self.show("NRestarts"))

    def journal(self, since: str = "-1d", priority: str = "debug") -> str:
        """Return what the service has logged, of a priority and above."""
        command = ["journalctl", "--unit", UNIT, "--output", "cat", "--no-pager"]
        return self.run(*command, "--since", since, "--priority", priority).stdout

    def now(self) -> str:
        """Return the time in journalctl's words."""
        return self.run("date", "+@%s.%N").stdout.strip()

    def listen(self) -> None:
        """Subscribe to everything, anew after a reboot."""
        # From outside: at a shutdown systemd would wait long for a process whose parent it is not.
        network = ["nsenter", "--target", str(self._leader()), "--net"]
        self._listening = subprocess.Popen(
            [*network, "mosquitto_sub", "-h", "127.0.0.1", "-t", "edge_asr/#", "-F", "%t %p"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ear = threading.Thread(target=self._hear, args=(self._listening,), daemon=True)
        self._ear.start()

    def texts(self) -> list[str]:
        """Return the transcripts heard."""
        return [body["text"] for topic, body in self.heard if topic.endswith("/transcript")]

    def state(self) -> dict[str, Any]:
        """Return the newest state."""
        states = [body for topic, body in self.heard if topic.endswith("/state") and body]
        return states[-1] if states else {}

    def command(self, name: str, payload: str) -> None:
        """Send a command to the service over MQTT."""
        device = next(topic.split("/")[1] for topic, _ in self.heard)
        self.run("mosquitto_pub", "-t", f"edge_asr/{device}/cmd/{name}", "-m", payload)

    def say(self, recording: str) -> str:
        """Play one of the bundled recordings to the microphone, and return what is then published as the transcript."""
        before = len(self.texts())
        self.until(self.recording, "the microphone")
        self.play(recording)
        self.until(lambda: len(self.texts()) > before, "the transcript")
        return self.texts()[-1]

    def play(self, recording: str) -> None:
        """Play one of the bundled recordings to the microphone."""
        self.run("paplay", "--device=virt", f"/media/stick/samples/{recording}")

    def recording(self) -> bool:
        """Tell whether somebody has the microphone open."""
        return bool(self.run("pactl", "list", "short", "source-outputs").stdout)

    def configure(self, change: Callable[[str], str]) -> None:
        """Change the service's configuration."""
        file = self.root / CONFIGURATION
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    def _remove_groups(self) -> None:
        for group in self._groups:
            for folder, _, _ in os.walk(group, topdown=False):
                Path(folder).rmdir()

    def _hear(self, listening: subprocess.Popen[str]) -> None:
        assert listening.stdout is not None
        with listening:
            for line in listening.stdout:
                topic, _, payload = line.rstrip("\n").partition(" ")
                with contextlib.suppress(ValueError):
                    self.heard.append((topic, json.loads(payload)))

    def _stop_listening(self) -> None:
        if self._listening is not None and self._ear is not None:
            self._listening.terminate()
            self._ear.join()

    def _leader(self) -> int | None:
        """Return the process id of the container's systemd, seen from outside."""
        assert self._machine is not None
        assert self._machine.poll() is None, (self.root.parent / "console.log").read_text(errors="replace")[-2000:]
        children = Path(f"/proc/{self._machine.pid}/task/{self._machine.pid}/children")
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        return None

    def _within(self, *command: str | Path) -> list[str]:
        environment = ["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        return ["nsenter", "--target", str(self._leader()), "--all", *environment, *map(str, command)]

    def _wait_for_systemd(self) -> None:
        settled = re.compile("running|degraded")
        self.until(
            lambda: settled.search(self.run("systemctl", "is-system-running", check=False).stdout), "systemd to settle"
        )


def control_groups() -> list[Path]:
    """Return where this process is in the control groups that systemd uses."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, name, place = line.split(":", 2)
        kind = "cgroup" if name else "cgroup2"
        found += [
            Path(mount[1] + place.rstrip("/"))
            for mount in mounts
            if name in ("", "name=systemd") and mount[2] == kind and (not name or name in mount[3].split(","))
        ]
    return found


def make_stick(folder: Path) -> None:
    """Make a stick with the release as it is, one that is newer, and a newer one that does not start."""
    copy = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    shutil.copytree(BUNDLE / "samples", folder / "samples")
    subprocess.run(
        [copy / "scripts" / "bundle", "--python", "3.11", folder / "current"],
        check=True,
    )
    for name, version, breaking in (("newer", "77.1", ""), ("broken", "77.2", "raise RuntimeError('broken')\n")):
        shutil.copytree(folder / "current", folder / name)
        (copy / "edge_asr" / "__init__.py").write_text(f'"""A release."""\n\n__version__ = "{version}"\n')
        with (copy / "edge_asr" / "app.py").open("a") as app:
            app.write(breaking)
        next((folder / name / "wheels").glob("edge_asr-*.whl")).unlink()
        subprocess.run(
            [REPOSITORY / ".venv/bin/pip", "wheel", "-q", "--no-deps", "-w", folder / name / "wheels", copy], check=True
        )
        (folder / name / "SHA256SUMS").unlink(missing_ok=True)


@contextmanager
def appliance(folder: Path) -> Iterator[Appliance]:
    """Boot a fresh one, with a microphone and a broker, until the end of the `with` block."""
    make_stick(folder / "stick")
    root = folder / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", TREE, root], check=True)
    for name, text in EXTRAS.items():
        (root / name).write_text(text, encoding="utf-8")
    machine = Appliance(root, folder / "stick")
    subprocess.run(["systemctl", f"--root={root}", "-q", "enable", "sound.service", "mosquitto.service"], check=True)
    try:
        machine.boot()
        yield machine
    finally:
        machine.power_off()
