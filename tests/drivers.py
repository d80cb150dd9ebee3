"""Our commands as processes of their own, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

_OUTSIDE = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")


def start(here: Path, module: str, *words: str, address: str = "") -> subprocess.Popen[str]:
    """`python -m module words...` in a folder, with a Ray of its own unless an address is given."""
    environment = {key: value for key, value in os.environ.items() if key not in _OUTSIDE}
    environment |= {"RAY_ADDRESS": address} if address else {}
    command = [sys.executable, "-m", module, *words]
    return subprocess.Popen(
        command, cwd=here, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def end(driver: subprocess.Popen[str], seconds: float = 400) -> str:
    """Waits for it to end well; what it said."""
    said, _ = driver.communicate(timeout=seconds)
    assert driver.returncode == 0, said
    return said
