"""Where a folder was cloned from, as its .git says; git itself is not run."""

import configparser
import re
from pathlib import Path


def git_origin(path: str) -> dict[str, str] | None:
    """Returns the address of the remote `origin` (without a password) and the commit, or None outside of a clone.

    Args:
        path: a file or folder; the clone may be a folder above it.
    """
    start = Path(path).expanduser().absolute()
    git = next((folder / ".git" for folder in (start, *start.parents) if (folder / ".git").is_dir()), None)
    if git is None:
        return None
    found = {"folder": str(git.parent)}
    try:
        config = configparser.ConfigParser(strict=False, interpolation=None)
        config.read_string((git / "config").read_text("utf-8", "replace"))
        if url := config.get('remote "origin"', "url", fallback=""):
            found["repository"] = re.sub(r"(?<=://)[^/@]*@", "", url)
    except (OSError, configparser.Error):
        pass
    if commit := _commit(git):
        found["commit"] = commit
    return found


def _commit(git: Path) -> str | None:
    try:
        head = (git / "HEAD").read_text("utf-8", "replace").strip()
        if not head.startswith("ref: "):
            return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None
        name = head.removeprefix("ref: ")
        if ".." in name.split("/"):
            return None
        if (git / name).is_file():
            return (git / name).read_text("utf-8", "replace").strip()
        for line in (git / "packed-refs").read_text("utf-8", "replace").splitlines():
            if line.endswith(" " + name):
                return line.split(" ")[0]
    except OSError:
        pass
    return None
