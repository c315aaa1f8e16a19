"""The tables that `benchmarks/gpu.py` ends with, in Markdown; from its JSON file also after it was stopped:

python benchmarks/gpu_report.py gpu_benchmark.json
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WRONG = 0.02  # relative error against float64 above which a bf16 result is marked


def report(content: dict[str, Any]) -> str:
    """All tables, and what failed or was left out.

    Args:
        content: of the JSON file.
    """
    good = [row for row in content["rows"] if "error" not in row]
    lines = [
        f"Measured on {content['date']}: {content.get('device')}, torch {content.get('torch')}"
        + (f", commit {content['commit']}" if content["commit"] else "")
        + f"; `{content['command']}`"
    ]
    tables = {
        "ceilings": _ceilings,
        "loss": _loss,
        "attention": _attention,
        "train": _training,
        "peers": _peers,
        "float8": _float8,
        "muon": _muon,
    }
    for part, table in tables.items():
        rows = [row for row in good if row["part"] == part]
        if rows:
            lines += ["", f"### {part}", ""]
            try:
                lines += table(rows, good)
            except Exception as error:  # the other tables are worth more than to end here
                lines.append(f"no table: {type(error).__name__}: {error}")
    remarks = [f"{row['part']}, {row['case']}: failed, {row['error']}" for row in content["rows"] if "error" in row]
    remarks += [f"{part}, {case}: left out, no time" for part, case in content["left_out"]]
    remarks += content.get("notes", [])
    if remarks:
        lines += ["", "### failed or left out", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [[_cell(value) for value in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [list(header), ["---"] * len(header), *cells]]


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _ceilings(rows: list[Row], _all: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if row["case"] == "product":
            found.append((row["shape"], f"{row['tflops']:,.0f} TFLOP/s"))
        else:
            found.append((f"copy of {row['bytes'] / 2**30:.3g} GiB", f"{row['gigabytes_per_second']:,.0f} GB/s"))
    return _table(["ceiling", "reached"], found)


def _loss(rows: list[Row], _all: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if "ms" in row:
            other = next((r for r in rows if r["case"] == row["case"] and r.get("variant", "").startswith("comp")), row)
            ratios = (row["ms"] / other["ms"], row["extra_gib"] / other["extra_gib"] if other["extra_gib"] else None)
            found.append((row["case"], row["variant"], row["ms"], ratios[0], row["extra_gib"], ratios[1]))
        else:
            errors = [row[key] for key in ("loss_error", "hidden_gradient_error", "weight_gradient_error")]
            mark = "" if all(error < WRONG for error in errors) else " **wrong**"
            text = f"relative errors {', '.join(f'{error:.1e}' for error in errors)}{mark}"
            found.append((row["case"], f"{row['variant']}: {text}", *[None] * 4))
    header = ["rows x width x vocabulary", "", "ms", "to full logits", "GiB beside gradients", "to full logits"]
    return _table(header, found)


def _attention(rows: list[Row], _all: list[Row]) -> list[str]:
    """A row per case, a column per backend: ms of forward / backward; the library's choice is bold."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row["row_len"], row["heads"], "causal" if row["causal"] else "both", row["documents"])
        cases.setdefault(key, {})[row["backend"]] = row
    found = [(*key, *(_times(by_name.get(name)) for name in backends)) for key, by_name in cases.items()]
    lines = _table(["tokens per row", "heads", "sees", "documents", *backends], found)
    for key, by_name in cases.items():
        totals = {name: row["forward_ms"] + row["backward_ms"] for name, row in by_name.items() if row["backward_ms"]}
        chosen = next((name for name in totals if by_name[name]["chosen"]), None)
        best = min(totals, key=totals.get, default=None)
        if chosen and totals[chosen] > 1.03 * totals[best]:
            case = ", ".join(map(str, key))
            lines += ["", f"{case}: {best} takes {totals[best] / totals[chosen]:.2f} of the time of {chosen}"]
    return lines


def _times(row: Row | None) -> str | None:
    if row is None:
        return None
    if row["forward_ms"] is None:
        return "failed"
    text = f"{row['forward_ms']:.2f}" + (f" / {row['backward_ms']:.2f}" if row["backward_ms"] else "")
    if not row["error_to_float64"] < WRONG:
        text += f" wrong ({row['error_to_float64']:.1g})"
    return f"**{text}**" if row["chosen"] else text


def _training(rows: list[Row], _all: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if "tokens_per_second" in row:
            found.append((row["case"], *_speed(row), *_kinds(row)))
    header = ["case", "rows x tokens", "tokens/s", "MFU", "peak GiB", "compile s", *_SHORT.values(), "idle %"]
    lines = _table(header, found) if found else []
    for row in rows:
        if "difference" in row:
            lines += [
                "",
                f"{row['case']}: after {row['steps']} steps {row['bf16']:.4f} and {row['fp32']:.4f}, difference "
                f"{row['difference']:+.4f}, deviation from step to step {row['noise']:.4f}",
            ]
    return lines


def _float8(rows: list[Row], everything: list[Row]) -> list[str]:
    """Every model's rows after its row in bf16, which the training part may have."""
    models = dict.fromkeys(row["case"].split(", ")[0] for row in rows)
    found = []
    for model in models:
        found += [row for row in everything if row["part"] == "train" and row["case"] == f"{model}, compiled"]
        found += [row for row in rows if row["case"].startswith(f"{model}, ")]
    return _training(found, everything)


_SHORT = {
    "attention": "attention %",
    "products": "products %",
    "grouped products": "grouped %",
    "norms and elementwise": "elementwise %",
    "optimizer": "optimizer %",
    "copies": "copies %",
    "other": "other %",
}


def _speed(row: Row) -> tuple:
    mfu = None if row["mfu"] is None else f"{row['mfu']:.3f}"
    return row["micro_batch"], row["tokens_per_second"], mfu, row["peak_gib"], row["compile_s"]


def _kinds(row: Row) -> list:
    return [*(row.get("shares", {}).get(kind) for kind in _SHORT), row.get("idle_percent")]


def _peers(rows: list[Row], everything: list[Row]) -> list[str]:
    found = []
    for row in rows:
        case = f"{row['beside']}, compiled"
        ours = next((r for r in everything if r["part"] == "train" and r["case"] == case), None)
        ratio = None if ours is None else ours["tokens_per_second"] / row["tokens_per_second"]
        found.append((row["case"], *_speed(row), row["beside"], None if ratio is None else f"{ratio:.2f}"))
    return _table(
        ["peer", "rows x tokens", "tokens/s", "MFU", "peak GiB", "compile s", "beside", "ours is faster by"], found
    )


def _muon(rows: list[Row], _all: list[Row]) -> list[str]:
    found = [(row["case"], row["variant"], row["ms"], row["percent_of_step"]) for row in rows]
    return _table(["parameters", "optimizer", "ms", "% of a step of 524,288 tokens at 0.5 MFU"], found)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
