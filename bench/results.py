"""Where and with what a run was made, its result file, and its tables."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, date, datetime
from importlib import metadata
from pathlib import Path

import torch
from result_schema import check
from rich.table import Table
from sensors import Sensors

from bert_fast.kernels import backend
from bert_fast.kernels.launch import slug, table_for

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "bert_fast", "torch", "triton", "transformers", "onnxruntime", "numpy", "flash-attn",
    "sentence-transformers", "liger-kernel",
)  # fmt: skip


class Results:
    """One run: a file, if path is given, that is whole and valid after each workload. Until there
    is something to say, a file that an earlier run wrote is left as it is.

    seconds  of the rounds of a workload, where a number was asked for
    """

    def __init__(self, path, known, part="bench", quick=False, seconds=None):
        self.path = path
        self.content = {
            "schema": 2,
            "part": part,
            "complete": False,
            "quick": quick,
            "seconds": seconds,
            "device": known,
            "versions": versions(),
            "environment": environment(known),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git commit": commit(),
            "ceilings": None,
            "rows": [],
        }
        check(self.content)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self):
        check(self.content)
        if self.path:
            new = self.path.with_suffix(".part")
            new.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
            new.replace(self.path)

    def add(self, **parts):
        """Set parts of the content, and write the file. Rows are appended, or take the place of
        those of the same workload and dtype: a figure and its baseline are of one run."""
        rows, new = self.content["rows"], parts.pop("rows", [])
        again = {_of(row) for row in new}
        place = next((n for n, row in enumerate(rows) if _of(row) in again), len(rows))
        rest = [row for row in rows[place:] if _of(row) not in again]
        self.content |= {"rows": [*rows[:place], *new, *rest], **parts}
        if self.content["rows"] or parts.keys() - {"ceilings"}:
            self.write()


def _of(row):
    return row["workload"], row["dtype"]


def device_of(device):
    """What is known of a torch.device, by name."""
    known = {
        "type": device.type,
        "name": _cpu_name(),
        "backend": backend(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # of the last 1, 5 and 15 minutes as the run began; Windows has none
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        of, sensors = torch.cuda.get_device_properties(device), Sensors(device)
        known |= {
            "name": of.name,
            "cpu": known["name"],
            "capability": f"{of.major}.{of.minor}",
            "memory": of.total_memory,
            "multiprocessors": of.multi_processor_count,
            "sensors": sensors.reason,
            "driver": sensors.driver(),
        }
    return known


def _cpu_name():
    """AMD EPYC, AVX2: the instructions too, as a virtual machine often names no model."""
    return f"{_model_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _model_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_name(known, part="bench"):
    """nvidia-h200-2026-01-31.json, with the part behind it if that is not the benchmark"""
    name = known["name"] if known["type"] == "cuda" else f"cpu {known['name']}"
    return f"{slug(name)}-{date.today()}{'' if part == 'bench' else f'-{part}'}.json"


def versions():
    """{package: version}, None for one that is not installed."""
    known = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            known[package] = None
    return known


def commit():
    """The commit of the tree, "-dirty" behind it if files differ; None outside of git."""
    if shutil.which("git") is None:
        return None
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


SOURCES = ("bench", "bert_fast", "check", "kernels", "tests")  # folders whose Python is run


def environment(known):
    """What a run depends on beside versions: {name: value or hash}, None where there is none.

    sources  of all Python files, those of the commit or not
    tuned    of the table of launch configurations for this device
    """
    gpu = [known.get(name) for name in ("name", "capability", "multiprocessors")]
    table, _ = table_for(*gpu) if known["type"] == "cuda" else (None, None)
    return {
        **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")},
        "sources": sources(),
        "tuned": table and _hash(table.read_bytes()),
    }


def sources():
    """A hash of the Python files and their paths."""
    files = (path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py")))
    hashes = (f"{path.relative_to(ROOT).as_posix()} {_hash(path.read_bytes())}\n" for path in files)
    return _hash("".join(hashes).encode())


def _hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


# -- tables ---------------------------------------------------------------------------------
def table(rows):
    """The rows of one workload, as a rich table."""
    first = rows[0]
    fill = "" if first["fill"] is None else f", fill {first['fill']:.2f}"
    checked = f"errors on {first['error_on']}, " if first["error_on"] else ""
    grid = Table(
        title=f"{first['workload']}, {first['dtype']}{fill}",
        caption=f"{checked}x: times the speed of {first['baseline']}",
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    grid.add_column("contender", no_wrap=True)
    for heading in (
        "ms", "95 % interval", "x median", "x min", "valid tokens/s", "share", "MB", "mJ",
        "max error", "RMS",
    ):  # fmt: skip
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("status", overflow="fold")
    for row in rows:
        grid.add_row(row["contender"], *_cells(row), _status(row))
    return grid


def _cells(row):
    """Each empty where the row knows nothing."""
    ms = row["median_s"] and (row["median_s"] * 1e3, *(bound * 1e3 for bound in row["ci"]))
    error = row["error"]
    return (
        ms and f"{ms[0]:.4g}",
        ms and f"{ms[1]:.4g} to {ms[2]:.4g}",
        row["ratio_median"] and f"{row['ratio_median']:.2f}",
        row["ratio_min"] and f"{row['ratio_min']:.2f}",
        row["valid_tokens_per_s"] and f"{row['valid_tokens_per_s']:,.0f}",
        row["share"] and f"{row['share']:.2f} {row['share_of']}",
        _in(row["peak_bytes"], 1e-6),
        _in(row["energy_j"], 1e3),
        error and f"{error['max']:.1e}",
        error and f"{error['rms']:.1e}",
    )


def _in(value, units):
    return None if value is None else f"{value * units:.3g}"


def _status(row):
    told = [row["status"], row["reason"], row["implementation"]]
    if row["added_us_per_layer"] is not None:
        told.append(f"{row['us_per_layer']:.0f} us a layer, {row['added_us_per_layer']:+.0f}")
    return ", ".join(filter(None, told))
