"""Print the README's figures, and the page of all of them, from the committed result files.

What stands between the two marks in README.md and docs/results.md is printed here, and nowhere
typed: for each device and set of dtypes the newest file with rows of the models, and older ones for
what it has no row of. The README has the rows that most people ask for. Of a GPU it has none whose
baseline waited for its host, unless it is of one sequence, of which the row with most rivals says
most. What failed is printed too, in place of what passed before.
"""

import os
import re
from itertools import takewhile
from pathlib import Path

import plots
from lengths import lengths_of
from measure import LEAST
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


HOST = 1.15  # times what one sequence takes: a baseline below that waits for launches


def newest(folder=RESULTS):
    """[(path, content)] of the files with rows of models that no newer one of their device has, or
    has of less worth. Smoke tests are not among them."""
    files = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    files = [f for f in files if f[1]["part"] == "bench" and not f[1].get("quick")]
    found, known = {}, {}
    for path, content in sorted(files, key=_date, reverse=True):
        device, of = content["device"]["name"], _by_contender(content["rows"])
        worth = {
            (device, row["dtype"], row["workload"]): _worth(row, of, content)
            for row in _shown(content["rows"])
        }
        if any(key not in known or known[key] < worth[key] for key in worth):
            found[device, *sorted({dtype for _, dtype, _ in worth}), path.name] = path, content
        # Of what failed in the newest file nothing older is worth more.
        failed = {key for key in worth if key not in known and worth[key] == FAILED}
        for key in worth:
            known[key] = ALL if key in failed else max(known.get(key, FAILED), worth[key])
    return [found[name] for name in sorted(found)]


def _date(file):
    return file[1]["date"]


FAILED, ALL = (0, 0), (3, 0)  # as _worth is; ALL is more than that of any


def _worth(row, of, content):
    """What is compared of two rows of a workload: the larger is printed, or of equal ones the
    newer."""
    if row["status"] != "ok":
        return FAILED
    if row["sequences"] == 1:  # where every baseline waits for its host: its rivals
        return 2, sum(bool(_over(of, row, name)) for name in COLUMNS)
    return (1 if waits_for_host(row, of, content) else 2), 0


def waits_for_host(row, of, content):
    """Whether the baseline of a row takes hardly longer than it does for one sequence: on a GPU
    that is the time of its launches, of whichever host there was."""
    if content["device"]["type"] != "cuda" or row["kind"] != "inference":
        return False
    size, dtype, baseline = row["workload"].split()[0], row["dtype"], row["baseline"]
    base = of.get((row["workload"], dtype, baseline))
    one = of.get((f"{size} batch-1", dtype, baseline))
    if not (base and one and base["median_s"] and one["median_s"]):
        return False
    batches = lengths_of(row["lengths"]).batches  # each of them launched anew
    return base["median_s"] / batches < HOST * one["median_s"]


MEANING = (
    "Each figure is how many times as fast ours is, with its 95 % interval where there were six"
    " rounds or more; error is ours over stock's, each against fp64."
)


def summary(files, pictures):
    """What stands between the README's marks, for files [(path, content)] and paths of pictures."""
    candidates = {}  # newest first
    for _, content in sorted(files, key=_date, reverse=True):
        of = _by_contender(content["rows"])
        for row in _shown(content["rows"]):
            name = re.sub(r"x\d+$", "", row["workload"])
            if name in ASKED_FOR:
                key = content["device"]["name"], row["dtype"], name
                candidates.setdefault(key, []).append((row, of, content))
    found = {key: _chosen(of) for key, of in candidates.items()}
    order = sorted(
        (key for key in found if found[key]), key=lambda key: (*key[:2], ASKED_FOR.index(key[2]))
    )
    columns = [c for c in COLUMNS if any(_over(found[key][1], found[key][0], c) for key in order)]
    headings = "on", "dtype", "workload", "tokens / positions", "stock sdpa", *columns, "error"
    lines = [_line(headings), "|" + " --- |" * len(headings)]
    for key in order:
        row, of, _ = found[key]
        others = (_over(of, row, column) for column in columns)
        cells = (*key[:2], row["workload"], _fill(row), _times(row), *others, _error(row))
        lines.append(_line(cells))
    shown = _pictures_of(files[0][0], pictures, README) if files else []
    return "\n".join([BEGIN, "", MEANING, "", *lines, "", *shown, *[""] * bool(shown), END])


def _chosen(candidates):
    """Of candidates (row, of, content), newest first, the one that the README has, or None: the
    newest if that failed, else that of most worth since one failed."""
    if candidates[0][0]["status"] != "ok":
        return candidates[0]
    best = max(
        takewhile(lambda candidate: candidate[0]["status"] == "ok", candidates),
        key=lambda candidate: _worth(*candidate),
    )
    return best if _worth(*best)[0] == 2 else None


def everything(files, pictures):
    """The same, of docs/results.md."""
    parts = [BEGIN]
    for path, content in files:
        parts += ["", _about(path, content), "", *_table(content)]
        if shown := _pictures_of(path, pictures, PAGE):
            parts += ["", *shown]
    return "\n".join([*parts, "", END])


def _pictures_of(path, pictures, page):
    """Those of the file in path, as page shows them."""
    names = {f"{path.stem}-{plot}.svg" for plot in plots.PLOTS}
    shown = [p for p in pictures if p.name in names]
    return [f"![{_alt(p, path)}]({_from(page, p)})" for p in shown]


def _from(page, path):
    return Path(os.path.relpath(path, page.parent)).as_posix()


HOST_MEANS = (
    f" Where it says host, stock took less than {HOST} times what it took for one sequence: the"
    " ratio is one of hosts."
)


def _has_host(content):
    of = _by_contender(content["rows"])
    shown = (row for row in _shown(content["rows"]) if row["status"] == "ok")
    return any(waits_for_host(row, of, content) for row in shown)


def _about(path, content):
    device, versions = content["device"], content["versions"]
    cores = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    load = f", load {device['load'][0]:.0f} as it began" if device["load"] else ""
    return (
        f"{device['name']}{cores}{load}; torch {versions['torch']}, transformers"
        f" {versions['transformers']}; {content['date'][:10]};"
        f" [every row]({_from(PAGE, path)}). {MEANING}{HOST_MEANS * _has_host(content)}"
    )


WRONG = ("FAILED", "error")


def _shown(rows):
    """Ours of the models' workloads, the last row of each: those with a ratio, and what failed."""
    of = {(r["workload"], r["dtype"]): r for r in rows if r["contender"] == "ours"}
    return [
        row for row in of.values()
        if row["kind"] in ("inference", "training") and row["us_per_layer"] is None
        and (row["ratio_median"] if row["status"] == "ok" else row["status"] in WRONG)
    ]  # fmt: skip


def _by_contender(rows):
    return {(r["workload"], r["dtype"], r["contender"]): r for r in rows}


def _over(of, row, name):
    """How many times as fast as the contender of that name, in words; "" where it was not timed."""
    other = of.get((row["workload"], row["dtype"], name))
    if other and other["status"] in WRONG:
        return other["status"]
    ratio = other and other["ratio_median"] and row["ratio_median"]
    return f"{row['ratio_median'] / other['ratio_median']:.1f}" if ratio else ""


def _error(row):
    if not (row["error"] and row["baseline_error"]):
        return ""
    return f"{row['error']['rms'] / row['baseline_error']['rms']:.2f}"


def _fill(row):
    return "" if row["fill"] is None else f"{row['fill']:.2f}"


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _table(content):
    of = _by_contender(content["rows"])
    shown = _shown(content["rows"])

    def frozen(row):
        frozen = of.get((row["workload"], row["dtype"], "ours, frozen"))
        if frozen and frozen["status"] in WRONG:
            return frozen["status"]
        ratio = frozen and frozen["ratio_median"]
        return f"{ratio:.1f}" if ratio else ""

    def times(row):
        if row["status"] != "ok":
            return f"{row['status']}: {row['reason']}".replace("|", "\\|")
        return _times(row) + ", host" * waits_for_host(row, of, content)

    columns = [name for name in COLUMNS if any(_over(of, row, name) for row in shown)]
    also = ["ours frozen, over stock sdpa"] * any(map(frozen, shown))
    headings = ["workload", "dtype", "tokens / positions", "stock sdpa", *also, *columns, "error"]
    yield _line(headings)
    yield "|" + " --- |" * len(headings)
    for row in shown:
        yield _line(
            (
                row["workload"], row["dtype"], _fill(row), times(row),
                *(frozen(row) for _ in also), *(_over(of, row, name) for name in columns),
                _error(row),
            )
        )  # fmt: skip


def _times(row):
    if row["status"] != "ok":
        return row["status"]
    if not row["ratio_ci"] or (row["rounds"] or 0) < LEAST:  # of fewer it is no 95 % interval
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
    found += [str(path.relative_to(ROOT)) for path in _not_drawn(pictures)]
    known = {path.name for path in pictures}
    return found + [p.name for p in PICTURES.glob("*.svg") if p.name not in known]


def _not_drawn(pictures):
    """Paths of those that are not drawn, or of other data."""
    for path, data in pictures.items():
        drawn = plots.DIGEST.search(path.read_text()) if path.exists() else None
        if drawn is None or drawn[1] != plots.digest(data):
            yield path


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
        for path in _not_drawn(pictures):  # another matplotlib draws the same otherwise
            plots.draw(pictures[path], path)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    for path, text in texts.items():
        path.write_text(text)
    return 0
