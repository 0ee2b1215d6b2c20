"""Compare two result files: what got slower, wrong or lost, beyond the intervals.

Status and error come first: what failed, or has no ratio any more, or errs by more, is worse
whatever its speed. Then speeds relative to the baseline of the same run, since absolute times
belong to one machine in one minute. A ratio has changed where the intervals of the two do not meet
and the medians are more than 2 % apart, as an interval is of one run. Only ours can be a
regression, and it is one to be missing: but for what was not installed there, or had no time.
"""

import sys
from pathlib import Path

from result_schema import read
from rich.console import Console
from rich.table import Table

KEY = ("workload", "dtype", "contender", "baseline")  # and the number of sequences
NOISE = 1.02  # times as fast, or slow, that a median is in another run
ERRS = 1.5  # times the error, on the same inputs, that is no longer the order of sums
WORSE = ("FAILED", "lost", "inexact", "slower")
NO_LOSS = ("budget", "time is short", "not installed")  # in the reason of what was skipped


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
    worse = [c for c in found if c["verdict"] in WORSE and _is_ours(c)]
    same = sum(c["verdict"] == "same" for c in found)
    console.print(f"{len(found)} rows compared: {len(worse)} of ours worse, {same} the same")
    return int(bool(worse))


def differences(a, b):
    """What makes two runs hard to compare: (name, before, after)."""
    told = []
    for content in (a, b):
        device, load = content["device"], content["device"]["load"]
        told.append({
            "the device": device["name"], "the host's CPU": device.get("cpu"),
            "the number of threads": device["threads"], "the driver": device.get("driver"),
            "the load as it began": load and round(load[0]), "the commit": content["git commit"],
            "complete": content.get("complete"), "quick": content.get("quick", False),
            "seconds": content.get("seconds"),
            **content.get("environment", {}), **content["versions"],
        })  # fmt: skip
    names = dict.fromkeys([*told[0], *told[1]])
    both = ((name, *(of.get(name) for of in told)) for name in names)
    return [(name, x, y) for name, x, y in both if x != y]


def changes(before, after):
    """A dict for each row that was ok in `before` and can be compared: KEY, "before", "after",
    "reason", "intervals", and "verdict", which is same, faster, slower, inexact, FAILED, or lost:
    an error, or not there, or without a ratio now. [] where no workload is in both."""
    known = {(*_key(row), row["sequences"]): row for row in after}
    named = {_key(row) for row in after}
    if not {_of(row) for row in before} & {_of(row) for row in after}:
        return []
    found = []
    for row in before:
        if row["status"] != "ok" or row["contender"] == row["baseline"]:
            continue
        # What was not measured has no number of sequences.
        other = known.get((*_key(row), row["sequences"])) or known.get((*_key(row), None))
        if other is None and (_key(row) in named or not _is_ours(row)):
            continue  # of other sequences, or a rival that was left out
        x = _interval(row, before)
        y = _interval(other, after) if other else None
        if (judged := _verdict(row, other, x, y)) is None:
            continue
        verdict, reason = judged
        found.append({
            **dict(zip(KEY, _key(row), strict=True)),
            "before": row["ratio_median"], "after": other and other["ratio_median"],
            "intervals": (x, y), "verdict": verdict, "reason": reason,
        })  # fmt: skip
    return found


def _verdict(row, other, x, y):
    """(verdict, reason), x and y being the intervals; None where there is nothing to compare."""
    if other is None:
        return "lost", "has no row"
    status, reason = other["status"], other["reason"]
    if status == "discarded":
        return None
    if status == "skipped":
        excused = not _is_ours(row) or any(why in (reason or "") for why in NO_LOSS)
        return None if excused else ("lost", f"skipped: {reason}")
    if status != "ok":
        return ("FAILED" if status == "FAILED" else "lost"), reason
    if _errs_more(row, other):
        return "inexact", f"RMS error {row['error']['rms']:.2g}, now {other['error']['rms']:.2g}"
    if row["ratio_median"] is None:
        return None  # it had none before
    if other["ratio_median"] is None:
        return "lost", "has no ratio: the baseline failed"
    if x is None or y is None:
        return None
    if y[1] < x[0] and other["ratio_median"] * NOISE < row["ratio_median"]:
        return "slower", reason
    if y[0] > x[1] and other["ratio_median"] > row["ratio_median"] * NOISE:
        return "faster", reason
    return "same", reason


def _errs_more(row, other):
    if not (row["error"] and other["error"]) or row["error_on"] != other["error_on"]:
        return False
    return other["error"]["rms"] > ERRS * row["error"]["rms"]


def _is_ours(row):
    return row["contender"].startswith("ours")


def _of(row):
    return row["workload"], row["dtype"]


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
    grid.add_column("", overflow="fold")
    order = (*WORSE, "faster", "same")
    for c in sorted(found, key=lambda c: order.index(c["verdict"])):
        cells = map(_cell, (c["before"], c["after"]), c["intervals"])
        worse = c["verdict"] in WORSE
        grid.add_row(
            c["workload"], c["dtype"], c["contender"], *cells, c["verdict"],
            c["reason"] if worse else None, style="red" if worse else None,
        )  # fmt: skip
    return grid


def _cell(ratio, interval):
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
