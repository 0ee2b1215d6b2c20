"""Draw a result file: SVG pictures, from its rows alone.

throughput  valid tokens/s by sequence length, batches without padding
roofline    FLOP/s of the ops by FLOP per byte, under the ceilings of the run
padding     times the speed of the baseline by the share of padding
latency     milliseconds by batch size, sequences of 128 tokens
"""

import hashlib
import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path

from result_schema import read

DIGEST = re.compile(r"<!-- data ([0-9a-f]{64}) -->")
COLOURS = {
    "ours": "#c1121f", "stock sdpa": "#1d3557", "stock eager": "#6c757d",
    "stock sdpa, CUDA graphs": "#457b9d",
    "torch.compile": "#2a9d8f", "torch.compile reduce-overhead": "#52b788",
    "torch.compile max-autotune": "#006d77",
    "FlashAttention unpadded": "#e76f51", "onnxruntime": "#8338ec", "flex_attention": "#f4a261",
}  # fmt: skip


# -- data: {"title", "x", "y", "series": {name: [[x, y], ...]}}, None where there is nothing ------
def _ok(rows, *kinds):
    return [row for row in rows if row["status"] == "ok" and row["kind"] in kinds]


def _series(rows, point):
    """{size contender: sorted points}, of at least two points each. A point with None is none."""
    found = defaultdict(list)
    for row in rows:
        if (xy := point(row)) is not None and None not in xy:
            found[row["workload"].split()[0], row["dtype"], row["contender"]].append(xy)
    return {k: sorted(v) for k, v in found.items() if len(v) > 1}


def _sized(found):
    """The names of _series as text, without what all of them share."""
    sizes = {(size, dtype) for size, dtype, _ in found}
    return {
        contender if len(sizes) == 1 else f"{size} {dtype} {contender}": points
        for (size, dtype, contender), points in found.items()
    }


def throughput(content):
    full = re.compile(r"full-\d+")
    rows = [r for r in _ok(content["rows"], "inference") if full.fullmatch(r["lengths"] or "")]
    series = _sized(_series(rows, lambda r: [r["padded_to"], r["valid_tokens_per_s"]]))
    return series and {
        "title": "Throughput, no padding", "x": "tokens of a sequence", "y": "valid tokens/s",
        "series": series,
    }  # fmt: skip


def padding(content):
    rows = [
        r for r in _ok(content["rows"], "inference")
        if r["fill"] and r["ratio_median"] and r["contender"] != r["baseline"]
    ]  # fmt: skip
    series = _sized(_series(rows, lambda r: [round(1 - r["fill"], 3), r["ratio_median"]]))
    return series and {
        "title": f"Speed-up over {rows[0]['baseline']}", "x": "share of padding",
        "y": "times as fast", "series": series, "points": True,
    }  # fmt: skip


def latency(content):
    def point(row):
        same = re.fullmatch(r"batch-1|full-128(x\d+)?", row["lengths"] or "")
        return [row["sequences"], row["median_s"] * 1e3] if same and row["median_s"] else None

    series = _sized(_series(_ok(content["rows"], "inference"), point))
    return series and {
        "title": "Latency, 128 tokens a sequence", "x": "sequences of a batch", "y": "ms",
        "series": series, "log": "xy",
    }  # fmt: skip


def roofline(content):
    rows = [
        r for r in _ok(content["rows"], "op", "backward")
        if content["ceilings"] and r["dtype"] in content["ceilings"]["C"]
        and r["contender"] in ("ours", r["baseline"])
        and r["flops"] and r["bytes"] and r["median_s"]
    ]  # fmt: skip
    if not rows:
        return None
    dtype = rows[0]["dtype"]
    series = defaultdict(list)
    for row in rows:
        if row["dtype"] == dtype:
            name = "ours" if row["contender"] == "ours" else "torch alone"
            series[name].append([row["flops"] / row["bytes"], row["flops"] / row["median_s"]])
    return {
        "title": f"Roofline, {dtype}", "x": "FLOP per byte", "y": "FLOP/s",
        "series": {name: sorted(points) for name, points in series.items()},
        "log": "xy", "points": True,
        "roof": [content["ceilings"]["B"], content["ceilings"]["C"][dtype]],
    }  # fmt: skip


PLOTS = {"throughput": throughput, "roofline": roofline, "padding": padding, "latency": latency}


def data_of(content):
    """{plot: its data} of those that the file has data for."""
    found = {name: plot(content) for name, plot in PLOTS.items()}
    for data in filter(None, found.values()):
        data["title"] += f"\n{content['device']['name']}"
    return {name: data for name, data in found.items() if data}


def digest(data):
    """What a picture is made of, in short. A picture carries it, so that a stale one shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# -- drawing --------------------------------------------------------------------------------
def draw(data, path):
    """Write an SVG. Raises ModuleNotFoundError, saying what to install, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('plots need matplotlib; pip install "bert_fast[plots]"')
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "bert_fast", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for name, points in data["series"].items():
            x, y = zip(*points, strict=True)
            colour = next((c for n, c in COLOURS.items() if name.endswith(n)), None)
            axes.plot(
                x, y, "o" if "points" in data else "o-", label=name, color=colour, markersize=4,
                linewidth=2.4 if name.endswith("ours") else 1.2,
            )  # fmt: skip
        if "roof" in data:
            _roof(axes, data)
        for axis in data.get("log", ""):
            getattr(axes, f"set_{axis}scale")("log")
        if "log" not in data:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=data["x"], ylabel=data["y"])
        axes.set_title(data["title"], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = path.read_text()
    path.write_text(text.replace("</svg>", f"<!-- data {digest(data)} -->\n</svg>"))


def _roof(axes, data):
    bandwidth, peak = data["roof"]
    x = [p[0] for points in data["series"].values() for p in points]
    knee = peak / bandwidth
    low, high = min(x) / 2, max(*x, knee) * 2
    axes.plot([low, knee, high], [low * bandwidth, peak, peak], "k--", label="ceilings")


def write(content, folder, stem):
    """Draw all that there is data for: the paths, folder/stem-plot.svg."""
    paths = []
    for name, data in data_of(content).items():
        paths.append(folder / f"{stem}-{name}.svg")
        draw(data, paths[-1])
    return paths


def add_arguments(parser):
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for the pictures")


def main(options, fail):
    try:
        content = read(options.file)
        paths = write(content, options.folder, options.file.stem)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    if not paths:
        fail(f"{options.file}: has no rows that a plot is made of")
    for path in paths:
        print(path)
    return 0
