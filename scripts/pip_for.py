"""pip as a Linux machine of another architecture or Python would run it; needs pip in the Python that runs this.

Usage: python scripts/pip_for.py PYTHON MACHINE PIP-ARGUMENTS...    such as: 3.10 aarch64 download --dest wheels numpy
"""

from __future__ import annotations

import sys

from pip._internal.cli.main import main
from pip._vendor.packaging import markers


def target_environment(python: str, machine: str) -> dict[str, str]:
    """Return what the markers of requirements are held against, such as `python_version < "3.11"`."""
    return {
        **markers.default_environment(),
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


if __name__ == "__main__":
    environment = target_environment(*sys.argv[1:3])
    # --python-version chooses wheels by their tags; markers are still those of the Python that runs, hence this.
    markers.default_environment = lambda: environment
    sys.exit(main(sys.argv[3:]))
