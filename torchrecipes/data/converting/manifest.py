"""What `manifest.json` of an import says of a source, and the summary that is printed of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrecipes.data.converting.git_origin import git_origin
from torchrecipes.data.sources.records import ReadStats

UNKNOWN = "unknown"
ESTIMATE = "characters / 4"


@dataclass
class SourceCounts:
    """What a source has given so far, and the position after it: a file, and the documents taken of that file."""

    file: int = 0
    taken: int = 0
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    inputs: int = 0  # files that were converted
    input_bytes: int = 0
    inputs_xxh3: str = ""  # of the names and contents of these files, in order
    licenses: dict[str, int] = field(default_factory=dict)  # documents by licence
    languages: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # by reason, as in ReadStats
    examples: dict[str, list[str]] = field(default_factory=dict)


def summary(manifest: Mapping[str, Any]) -> str:
    """Describes an import in lines: per source its documents, tokens, licences, and what was skipped."""
    lines = []
    counted = "estimated tokens (characters / 4)" if manifest["settings"]["tokens"] == ESTIMATE else "tokens"
    for name, source in manifest["sources"].items():
        size = f"{source['documents']:,} documents, {source['characters']:,} characters, {source['tokens']:,} {counted}"
        read = f"{source['files']:,} of {source['files_found']:,} files, to the {source['ended_with']}"
        lines.append(f"{name}: {size}; {read}")
        for what in ("licenses", "languages"):
            if source[what]:
                ordered = sorted(source[what].items(), key=lambda item: (-item[1], item[0]))
                more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
                lines.append(f"  {what}: {', '.join(f'{key} {count:,}' for key, count in ordered[:8])}{more}")
        if source["licenses"].get(UNKNOWN):
            unknown = source["licenses"][UNKNOWN]
            lines.append(f"  warning: no licence was found for {unknown:,} documents: say it with --license")
        lines += [f"  {line}" for line in source["skipped"]]
    return "\n".join(lines)


def describe_source(
    count: SourceCounts, paths: Sequence[str], license_files: dict[str, str | None], found: int, target: int | None
) -> dict[str, Any]:
    """Returns what the manifest says of a source.

    Args:
        count: what it gave.
        paths: as they were given.
        license_files: what was found in them.
        found: number of its files.
        target: of its tokens.
    """
    if target is not None and count.tokens >= target:
        ended_with = "target"
    else:
        ended_with = "last file" if count.file == found else "target of all sources"
    return {
        "paths": [os.path.abspath(os.path.expanduser(path)) for path in paths],
        "origins": [origin for path in paths if (origin := git_origin(path))],
        "documents": count.documents,
        "characters": count.characters,
        "tokens": count.tokens,
        "files": count.inputs,
        "files_found": found,
        "ended_with": ended_with,
        "input_bytes": count.input_bytes,
        "inputs_xxh3": count.inputs_xxh3,
        "licenses": dict(sorted(count.licenses.items())),
        "license_files": {file: license or UNKNOWN for file, license in sorted(license_files.items())},
        "languages": dict(sorted(count.languages.items())),
        "skipped": skipped_lines(count),
    }


def skipped_lines(count: SourceCounts) -> list[str]:
    """Returns for every reason its count and examples."""
    return ReadStats(skipped=count.skipped, examples=count.examples).lines()[1:]
