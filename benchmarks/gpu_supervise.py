"""Watches the process in which `benchmarks/gpu.py` measures, and its JSON file. Imports no torch: it only waits."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

MOST_RESTARTS = 6
DEVICE_LOST = 75  # exit code of a process that cannot use its GPU any more


def supervise(path: Path, command: list[str], environment: dict[str, str], seconds_per_case: float) -> int:
    """Runs a process that measures, and again after it died or hung, without the case in which it did.

    Args:
        path: of the JSON file, which the process extends if it is there.
        command, environment: of the process.
        seconds_per_case: a case that takes longer is given up.

    Returns:
        The exit code of the last process.
    """
    while True:
        process, late = subprocess.Popen(command, env=environment), False
        try:
            while (code := _wait(process)) is None:
                running = read_json(path).get("running")
                if running and time.time() - running["since"] > seconds_per_case:
                    late = True
                    process.kill()
        except KeyboardInterrupt:
            process.kill()
            return 130
        content = read_json(path)
        running = content.get("running")
        if not (running or code == DEVICE_LOST) or content["restarts"] >= MOST_RESTARTS:
            return code
        if running:
            error = "took too long and was ended" if late else f"the process ended with exit code {code}"
            content["rows"].append({"part": running["part"], "case": running["case"], "error": error})
            print(f"{running['part']} | {running['case']}: {error}; the next case follows", flush=True)
        write_json(path, content | {"running": None, "restarts": content["restarts"] + 1})


def _wait(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(2)
    except subprocess.TimeoutExpired:
        return None


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file as a whole: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
