"""Compare two result files: what got slower, or wrong, beyond the intervals.

Compared are speeds relative to the baseline of the same run, since absolute times belong to one
machine in one minute. A ratio has changed where the intervals of the two do not meet and the
medians are more than 2 % apart, as an interval is of one run. Only ours can be a regression.
"""

import sys
from pathlib import Path

from result_schema import read
from rich.console import Console
from rich.table import Table

KEY = ("workload", "dtype", "contender", "baseline")
NOISE = 1.02  # times as fast, or slow, that a median is in another run


def add_arguments(parser):
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")


def main(options, fail):
    try:
        a, b = read(options.before), read(options.after)
    except ValueError as error:
        fail(str(error))
    console = Console(width=None if sys.stdout.isatty() else 150)
    for what, x, y in differences(a, b):
        console.print(f"note: {what} was {x}, is {y}", markup=False)
    found = changes(a["rows"], b["rows"])
    if not found:
        fail(f"{options.before} and {options.after} have no row in common")
    console.print(table(found))
    worse = [
        c for c in found
        if c["verdict"] in ("slower", "lost", "FAILED") and c["contender"].startswith("ours")
    ]  # fmt: skip
    same = sum(c["verdict"] == "same" for c in found)
    console.print(f"{len(found)} rows in both: {len(worse)} of ours worse, {same} the same")
    return int(bool(worse))


def differences(a, b):
    """What makes two runs hard to compare: (name, before, after)."""
    named = [("the device", a["device"]["name"], b["device"]["name"])]
    for package in a["versions"].keys() & b["versions"].keys():
        named.append((package, a["versions"][package], b["versions"][package]))
    return [(what, x, y) for what, x, y in sorted(named) if x != y]


def changes(before, after):
    """A dict for each row that ran in `before` and is in `after`: KEY, "before", "after", "reason",
    "intervals", and "verdict", which is same, faster, slower, FAILED, or lost for another error."""
    known = {_key(row): row for row in after}
    found = []
    for row in before:
        other = known.get(_key(row))
        if other is None or row["status"] != "ok" or row["contender"] == row["baseline"]:
            continue
        if other["status"] == "skipped" or row["ratio_median"] is None:
            continue  # not installed there, or out of time: nothing got worse
        x, y = _interval(row, before), _interval(other, after)
        if other["status"] != "ok":
            verdict = "FAILED" if other["status"] == "FAILED" else "lost"
        elif x is None or y is None or other["ratio_median"] is None:
            continue
        elif y[1] < x[0] and other["ratio_median"] * NOISE < row["ratio_median"]:
            verdict = "slower"
        elif y[0] > x[1] and other["ratio_median"] > row["ratio_median"] * NOISE:
            verdict = "faster"
        else:
            verdict = "same"
        found.append({
            **dict(zip(KEY, _key(row), strict=True)),
            "before": row["ratio_median"], "after": other["ratio_median"],
            "intervals": (x, y), "verdict": verdict, "reason": other["reason"],
        })  # fmt: skip
    return found


def _key(row):
    return tuple(row[name] for name in KEY)


def _interval(row, rows):
    """Of the ratio; where a file has none of that, from those of the two times, which is wider."""
    if row["ratio_ci"] or not row["ci"]:
        return row["ratio_ci"]
    of_base = (row["workload"], row["dtype"], row["baseline"], row["baseline"])
    base = next((r for r in rows if _key(r) == of_base), None)
    return base and base["ci"] and (base["ci"][0] / row["ci"][1], base["ci"][1] / row["ci"][0])


def table(found):
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("workload", "dtype", "contender"):
        grid.add_column(heading, overflow="fold")
    for heading in ("before", "after"):
        grid.add_column(f"x {heading}", justify="right", no_wrap=True)
    grid.add_column("verdict", no_wrap=True)
    order = ("FAILED", "lost", "slower", "faster", "same")
    for c in sorted(found, key=lambda c: order.index(c["verdict"])):
        cells = map(_cell, (c["before"], c["after"]), c["intervals"])
        style = "red" if c["verdict"] in ("FAILED", "lost", "slower") else None
        grid.add_row(c["workload"], c["dtype"], c["contender"], *cells, c["verdict"], style=style)
    return grid


def _cell(ratio, interval):
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
