"""Print the README's figures, and the page of all of them, from the committed result files.

What stands between the two marks in README.md and docs/results.md is printed here, and nowhere
typed: for each device and set of dtypes the newest file with rows of the models, and older ones for
what it has no row of. The README has the rows that most people ask for.
"""

import os
import re
from pathlib import Path

import plots
from result_schema import read

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "bench" / "results", ROOT / "docs" / "pictures"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- printed by `python bench readme` -->", "<!-- end of what is printed -->"
# beside the baseline
COLUMNS = (
    "stock eager", "stock sdpa, CUDA graphs", "torch.compile", "onnxruntime",
    "FlashAttention unpadded",
)  # fmt: skip
# Workloads of the README, of any number of sequences.
ASKED_FOR = (
    "base docstrings", "base docstrings-sorted", "base squad-384", "base full-128", "base full-512",
    "base batch-1", "6x384 docstrings", "large squad-384", "large full-384",
    "train 6x384 docstrings", "train base wikipedia-512",
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


MEANING = (
    "Each figure is how many times as fast ours is, with its 95 % interval where the file has one;"
    " error is ours over stock's, each against fp64."
)


def summary(files, pictures):
    """What stands between the README's marks, for files [(path, content)] and paths of pictures."""
    found = {}
    for _, content in sorted(files, key=lambda file: file[1]["date"], reverse=True):
        of = _by_contender(content["rows"])
        for row in _shown(content["rows"]):
            name = re.sub(r"x\d+$", "", row["workload"])
            key = content["device"]["name"], row["dtype"], name
            if name in ASKED_FOR:
                found.setdefault(key, (row, of))
    order = sorted(found, key=lambda key: (*key[:2], ASKED_FOR.index(key[2])))
    columns = [c for c in COLUMNS if any(_over(found[key][1], found[key][0], c) for key in order)]
    headings = "on", "dtype", "workload", "tokens / positions", "stock sdpa", *columns, "error"
    lines = [_line(headings), "|" + " --- |" * len(headings)]
    for device, dtype, name in order:
        row, of = found[device, dtype, name]
        others = (_over(of, row, column) for column in columns)
        fill = f"{row['fill']:.2f}"
        lines.append(_line((device, dtype, name, fill, _times(row), *others, _error(row))))
    shown = _pictures_of(files[0][0], pictures, README) if files else []
    return "\n".join([BEGIN, "", MEANING, "", *lines, "", *shown, *[""] * bool(shown), END])


def everything(files, pictures):
    """The same, of docs/results.md."""
    parts = [BEGIN]
    for path, content in files:
        parts += ["", _about(path, content), "", *_table(content["rows"])]
        if shown := _pictures_of(path, pictures, PAGE):
            parts += ["", *shown]
    return "\n".join([*parts, "", END])


def _pictures_of(path, pictures, page):
    """Those of the file in path, as page shows them."""
    shown = [p for p in pictures if p.name.startswith(f"{path.stem}-")]
    return [f"![{_alt(p, path)}]({_from(page, p)})" for p in shown]


def _from(page, path):
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _about(path, content):
    device, versions = content["device"], content["versions"]
    cores = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    return (
        f"{device['name']}{cores}; torch {versions['torch']}, transformers"
        f" {versions['transformers']}; {content['date'][:10]};"
        f" [every row]({_from(PAGE, path)}). {MEANING}"
    )


def _shown(rows):
    """Ours of the models' workloads, the last row of each."""
    of = {(r["workload"], r["dtype"]): r for r in rows if r["contender"] == "ours"}
    return [
        row for row in of.values()
        if row["kind"] in ("inference", "training")
        and row["status"] == "ok" and row["ratio_median"] and row["us_per_layer"] is None
    ]  # fmt: skip


def _by_contender(rows):
    return {(r["workload"], r["dtype"], r["contender"]): r for r in rows}


def _over(of, row, name):
    """How many times as fast as the contender of that name, in words; "" where it was not timed."""
    other = of.get((row["workload"], row["dtype"], name))
    ratio = other and other["ratio_median"]
    return f"{row['ratio_median'] / ratio:.1f}" if ratio else ""


def _error(row):
    return f"{row['error']['rms'] / row['baseline_error']['rms']:.2f}"


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _table(rows):
    of = _by_contender(rows)
    shown = _shown(rows)

    def frozen(row):
        frozen = of.get((row["workload"], row["dtype"], "ours, frozen"))
        ratio = frozen and frozen["ratio_median"]
        return f"{ratio:.1f}" if ratio else ""

    columns = [name for name in COLUMNS if any(_over(of, row, name) for row in shown)]
    also = ["ours frozen, over stock sdpa"] * any(map(frozen, shown))
    headings = ["workload", "dtype", "tokens / positions", "stock sdpa", *also, *columns, "error"]
    yield _line(headings)
    yield "|" + " --- |" * len(headings)
    for row in shown:
        yield _line(
            (
                row["workload"], row["dtype"], f"{row['fill']:.2f}", _times(row),
                *(frozen(row) for _ in also), *(_over(of, row, name) for name in columns),
                _error(row),
            )
        )  # fmt: skip


def _times(row):
    if not row["ratio_ci"]:
        return f"{row['ratio_median']:.1f}"
    low, high = row["ratio_ci"]
    return f"{row['ratio_median']:.1f} ({low:.1f} to {high:.1f})"


def _alt(picture, path):
    return f"{picture.stem.removeprefix(f'{path.stem}-')} on {path.stem}"


def wanted():
    """{path: text} of the README and the page as they should be, and {path of a picture: its
    data}."""
    files = newest()
    pictures = {
        PICTURES / f"{path.stem}-{name}.svg": data
        for path, content in files
        for name, data in plots.data_of(content).items()
    }
    texts = {}
    for path, block in ((README, summary), (PAGE, everything)):
        before, begin, rest = path.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{path.relative_to(ROOT)} must have the lines {BEGIN} and {END}")
        texts[path] = before + block(files, pictures) + after
    return texts, pictures


def stale():
    """What differs from the committed files, in words; [] if nothing does."""
    texts, pictures = wanted()
    found = [str(p.relative_to(ROOT)) for p, text in texts.items() if p.read_text() != text]
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
        texts, pictures = wanted()
        for old in PICTURES.glob("*.svg"):
            if old not in pictures:
                old.unlink()
        for path, data in pictures.items():
            plots.draw(data, path)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    for path, text in texts.items():
        path.write_text(text)
    return 0
