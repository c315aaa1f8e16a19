"""Counts and examples of what was removed; the report as JSON, Markdown and a self-contained HTML page."""

import html
import re
from dataclasses import dataclass, field
from typing import Any

from torchrecipes.data.sources.records import EXAMPLES_PER_REASON

EXAMPLE_CHARACTERS = 300


@dataclass
class Tally:
    """What happened to documents.

    Attributes:
        documents: documents in.
        characters: their characters.
        removed: documents and characters by rule.
        changed: documents and characters by step; characters are those that are gone.
        examples: the first ones by rule, in the order of the documents.
    """

    documents: int = 0
    characters: int = 0
    removed: dict[str, list[int]] = field(default_factory=dict)
    changed: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add_input(self, characters: int) -> None:
        """Count a document."""
        self.documents += 1
        self.characters += characters

    def add_removed(self, rule: str, characters: int) -> None:
        """Count a document that is removed; of duplicates, its characters after other steps."""
        counts = self.removed.setdefault(rule, [0, 0])
        counts[0] += 1
        counts[1] += characters

    def add_changed(self, step: str, characters: int) -> None:
        """Count a document that a step changed, and how many characters shorter it is now."""
        counts = self.changed.setdefault(step, [0, 0])
        counts[0] += 1
        counts[1] += characters

    def wants_example(self, rule: str) -> bool:
        """Whether there are few examples of a rule."""
        return len(self.examples.get(rule, ())) < EXAMPLES_PER_REASON

    def add_example(self, rule: str, source: str, text: str, detail: str) -> None:
        """Keep an example; of the text, its beginning."""
        start = text[:EXAMPLE_CHARACTERS] + ("..." if len(text) > EXAMPLE_CHARACTERS else "")
        self.examples.setdefault(rule, []).append({"source": source, "text": start, "detail": detail})

    def to_record(self) -> dict[str, Any]:
        """Return what `add_record` adds."""
        return {"removed": self.removed, "changed": self.changed, "examples": self.examples}

    def add_record(self, record: dict[str, Any]) -> None:
        """Add the counts and examples of a piece."""
        self.documents += record["documents"]
        self.characters += record["characters"]
        for mine, theirs in ((self.removed, record["removed"]), (self.changed, record["changed"])):
            for name, (documents, characters) in theirs.items():
                counts = mine.setdefault(name, [0, 0])
                counts[0] += documents
                counts[1] += characters
        for rule, examples in record["examples"].items():
            kept = self.examples.setdefault(rule, [])
            kept += examples[: EXAMPLES_PER_REASON - len(kept)]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and examples for a report."""
        gone = [sum(counts[position] for counts in self.removed.values()) for position in (0, 1)]
        shorter = sum(characters for _, characters in self.changed.values())

        def by_count(counts: dict[str, list[int]]) -> dict[str, dict[str, int]]:
            ordered = sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))
            return {
                name: {"documents": documents, "characters": characters} for name, (documents, characters) in ordered
            }

        return {
            "documents": self.documents,
            "characters": self.characters,
            "kept_documents": self.documents - gone[0],
            "kept_characters": self.characters - gone[1] - shorter,
            "removed": by_count(self.removed),
            "changed": by_count(self.changed),
            "examples": {rule: self.examples[rule] for rule in sorted(self.examples)},
        }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Return the counts of a report, a line for each rule."""
    kept, total = report["kept_documents"], report["documents"]
    lines = [f"kept {kept:,} of {total:,} documents ({_share(kept, total)})"]
    for rule, counts in report["removed"].items():
        lines.append(f"removed {counts['documents']:>9,}  {rule}")
    for step, counts in report["changed"].items():
        lines.append(f"changed {counts['documents']:>9,}  {step}")
    for reason, counts in report["bad_records"].items():
        lines.append(f"skipped {counts['records']:>9,}  {reason}")
    return lines


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown; texts are quoted so that nothing in them is markup."""
    lines = [f"# {_title(report)}", ""]
    for head, rows in _tables(report):
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
        lines.append("")
    lines += ["## Examples", ""] if report["examples"] else []
    for rule, examples in report["examples"].items():
        lines += [f"### {rule}", ""]
        for example in examples:
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", example["text"])), default=0))
            lines += [
                f"{_code(example['source'])}: {_code(example['detail'])}",
                "",
                f"{fence}text",
                example["text"],
                fence,
                "",
            ]
    return "\n".join(lines)


def to_html(report: dict[str, Any]) -> str:
    """Return the report as one HTML page that loads nothing; every text is escaped."""
    parts = [f"<h1>{html.escape(_title(report))}</h1>"]
    for head, rows in _tables(report):
        parts.append("<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>")
        for row in rows:
            parts.append(
                "<tr>" + "".join(f"<td{_align(value)}>{html.escape(_shown(value))}</td>" for value in row) + "</tr>"
            )
        parts.append("</table>")
    if report["examples"]:
        parts.append("<h2>Examples</h2>")
    for rule, examples in report["examples"].items():
        parts.append(f"<details><summary>{html.escape(rule)}</summary>")
        for example in examples:
            parts.append(
                f"<p><code>{html.escape(example['source'])}</code>: {html.escape(example['detail'])}</p>"
                f"<pre>{html.escape(example['text'])}</pre>"
            )
        parts.append("</details>")
    return _PAGE.format(title=html.escape(_title(report)), body="\n".join(parts))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; }} th, td {{ padding: .2em .8em; border-bottom: 1px solid #ccc; }}
th {{ text-align: left; }} .n {{ text-align: right; font-variant-numeric: tabular-nums; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; color: #222; padding: .6em; }}
summary {{ cursor: pointer; font-weight: 600; margin: .5em 0; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd; }} }}
</style></head><body>
{body}
</body></html>
"""


def _title(report: dict[str, Any]) -> str:
    job = {"clean": "Cleaning", "decontaminate": "Decontamination"}[report["job"]]
    return f"{job}: kept {report['kept_documents']:,} of {report['documents']:,} documents"


def _tables(report: dict[str, Any]) -> list[tuple[list[str], list[list[Any]]]]:
    """Return the tables as (names of the columns, rows)."""
    documents, characters = report["documents"], report["characters"]
    rows: list[list[Any]] = [["in", documents, "", characters]]
    for rule, counts in report["removed"].items():
        rows.append(
            [f"removed by {rule}", counts["documents"], _share(counts["documents"], documents), counts["characters"]]
        )
    for step, counts in report["changed"].items():
        rows.append(
            [f"changed by {step}", counts["documents"], _share(counts["documents"], documents), counts["characters"]]
        )
    kept = report["kept_documents"]
    rows.append(["kept", kept, _share(kept, documents), report["kept_characters"]])
    tables = [(["what", "documents", "share", "characters"], rows)]
    if report["bad_records"]:
        skipped = [
            [reason, counts["records"], ", ".join(counts["examples"])]
            for reason, counts in report["bad_records"].items()
        ]
        tables.append((["bad records", "records", "examples"], skipped))
    if report["references"]:
        head = list(dict.fromkeys(key for reference in report["references"] for key in reference))
        tables.append((head, [[reference.get(key, "") for key in head] for reference in report["references"]]))
    steps = [
        [name, ", ".join(f"{key}={value}" for key, value in options.items())]
        for name, options in report["steps"].items()
    ]
    tables.append((["step", "options"], [["input", report["input"]], *steps]))
    return tables


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "0.0%"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _align(value: Any) -> str:
    return ' class="n"' if isinstance(value, int) or str(value).endswith("%") else ""


def _cell(value: Any) -> str:
    return _shown(value) if isinstance(value, int) or not str(value) else _code(str(value)).replace("|", "\\|")


def _code(text: str) -> str:
    """Return text as inline code: one line, in more backticks than it has."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
