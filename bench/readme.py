"""Print the README's figures and pictures from the committed result files.

What stands between the two marks in README.md is printed here, and nowhere typed: for each device
and set of dtypes the newest file with rows of the models, and older ones for what it has no row of.
"""

from pathlib import Path

import plots
from result_schema import read

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES, README = (
    ROOT / "bench" / "results", ROOT / "docs" / "pictures", ROOT / "README.md"
)  # fmt: skip
BEGIN, END = "<!-- printed by `python bench readme` -->", "<!-- end of what is printed -->"
# beside the baseline
COLUMNS = (
    "stock eager", "stock sdpa, CUDA graphs", "torch.compile", "onnxruntime",
    "FlashAttention unpadded",
)  # fmt: skip


def newest(folder=RESULTS):
    """[(path, content)] of the files with rows of models that no newer one of their device has."""
    files = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    files.sort(key=lambda file: file[1]["date"], reverse=True)
    found, known = {}, set()
    for path, content in files:
        device = content["device"]["name"]
        rows = {(device, row["dtype"], row["workload"]) for row in _shown(content["rows"])}
        if content["part"] == "bench" and not rows <= known:
            known |= rows
            found[device, *sorted({dtype for _, dtype, _ in rows}), path.name] = path, content
    return [found[name] for name in sorted(found)]


def block(files, pictures):
    """What stands between the marks, for files [(path, content)] and paths of pictures."""
    parts = [BEGIN]
    for path, content in files:
        parts += ["", *_about(path, content), "", *_table(content["rows"])]
        shown = [p for p in pictures if p.name.startswith(f"{path.stem}-")]
        if shown:
            parts += ["", *(f"![{_alt(p, path)}]({p.relative_to(ROOT)})" for p in shown)]
    return "\n".join([*parts, "", END])


def _about(path, content):
    device, versions = content["device"], content["versions"]
    cores = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    yield (
        f"{device['name']}{cores}; torch {versions['torch']}, transformers"
        f" {versions['transformers']}; {content['date'][:10]};"
        f" [every row](bench/results/{path.name}). Each figure is how many times as fast ours is,"
        " with its 95 % interval where the file has one; error is ours over stock's, each against"
        " fp64."
    )


def _shown(rows):
    """Ours of the models' workloads, the last row of each."""
    of = {(r["workload"], r["dtype"]): r for r in rows if r["contender"] == "ours"}
    return [
        row for row in of.values()
        if row["kind"] in ("inference", "training")
        and row["status"] == "ok" and row["ratio_median"] and row["us_per_layer"] is None
    ]  # fmt: skip


def _table(rows):
    of = {(r["workload"], r["dtype"], r["contender"]): r for r in rows}
    shown = _shown(rows)

    def over(row, name):
        other = of.get((row["workload"], row["dtype"], name))
        ratio = other and other["ratio_median"]
        return f"{row['ratio_median'] / ratio:.1f}" if ratio else ""

    def frozen(row):
        frozen = of.get((row["workload"], row["dtype"], "ours, frozen"))
        ratio = frozen and frozen["ratio_median"]
        return f"{ratio:.1f}" if ratio else ""

    columns = [name for name in COLUMNS if any(over(row, name) for row in shown)]
    also = ["ours frozen, over stock sdpa"] * any(map(frozen, shown))
    headings = ["workload", "dtype", "tokens / positions", "stock sdpa", *also, *columns, "error"]
    yield "| " + " | ".join(headings) + " |"
    yield "|" + " --- |" * len(headings)
    for row in shown:
        cells = [
            row["workload"], row["dtype"], f"{row['fill']:.2f}", _times(row),
            *(frozen(row) for _ in also),
            *(over(row, name) for name in columns),
            f"{row['error']['rms'] / row['baseline_error']['rms']:.2f}",
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def _times(row):
    if not row["ratio_ci"]:
        return f"{row['ratio_median']:.1f}"
    low, high = row["ratio_ci"]
    return f"{row['ratio_median']:.1f} ({low:.1f} to {high:.1f})"


def _alt(picture, path):
    return f"{picture.stem.removeprefix(f'{path.stem}-')} on {path.stem}"


def wanted():
    """The README as it should be, and {path of a picture: its data}."""
    files = newest()
    pictures = {
        PICTURES / f"{path.stem}-{name}.svg": data
        for path, content in files
        for name, data in plots.data_of(content).items()
    }
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN} and {END}")
    return before + block(files, pictures) + after, pictures


def stale():
    """What differs from the committed files, in words; [] if nothing does."""
    text, pictures = wanted()
    found = [] if README.read_text() == text else ["README.md"]
    for path, data in pictures.items():
        drawn = plots.DIGEST.search(path.read_text()) if path.exists() else None
        if drawn is None or drawn[1] != plots.digest(data):
            found.append(str(path.relative_to(ROOT)))
    known = {path.name for path in pictures}
    return found + [p.name for p in PICTURES.glob("*.svg") if p.name not in known]


def add_arguments(parser):
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")


def main(options, fail):
    try:
        if options.check:
            found = stale()
            for what in found:
                print(f"{what} is not what the results say; python bench readme prints it anew")
            return int(bool(found))
        text, pictures = wanted()
        for old in PICTURES.glob("*.svg"):
            if old not in pictures:
                old.unlink()
        for path, data in pictures.items():
            plots.draw(data, path)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    README.write_text(text)
    return 0
