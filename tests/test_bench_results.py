"""What is made of a result: the file and its schema, the comparison, the plots, the README."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bert_fast.kernels import launch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import cli
import comparison
import contenders
import plots
import readme
import result_schema
import results

FILES = sorted((readme.ROOT / "bench" / "results").glob("*.json"))


def row(contender, ratio=None, spread=0.05, **options):
    median = 1.0 / ratio if ratio else None
    around = ratio and [ratio * (1 - spread), ratio * (1 + spread)]
    return {
        **dict.fromkeys(result_schema.ROW),
        "workload": "base full-128", "kind": "inference", "lengths": "full-128", "sequences": 32,
        "padded_to": 128, "fill": 1.0, "dtype": "float32", "contender": contender,
        "baseline": "stock sdpa", "median_s": median, "ratio_median": ratio, "ratio_ci": around,
        "valid_tokens_per_s": ratio and 100.0 * ratio, "status": "ok", "rounds": 6,
        **options,
    }  # fmt: skip


def content(*rows, **options):
    device = {
        "type": "cpu", "name": "a CPU", "backend": "pytorch", "cores": 2, "threads": 2, "load": None
    }  # fmt: skip
    return {
        "schema": 2, "part": "bench", "complete": True, "device": device,
        "versions": {"torch": "2.13", "transformers": "5.23"}, "date": "2026-01-31T00:00:00+00:00",
        "git commit": None, "ceilings": None, "rows": list(rows), **options,
    }  # fmt: skip


def saved(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def run(capsys, monkeypatch, *arguments):
    """(exit status, output, errors) of a command."""
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    try:
        status = cli.main("")
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


# -- the schema -----------------------------------------------------------------------------
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_committed_files_are_valid(path):
    result_schema.read(path)


def test_rows_that_were_discarded_say_why_have_no_ratio_and_are_named():
    named = (readme.RESULTS / "README.md").read_text()
    for path in FILES:
        found = result_schema.read(path)["rows"]
        discarded = [row for row in found if row["status"] == "discarded"]
        assert all(row["reason"] and row["ratio_median"] is None for row in discarded)
        assert not discarded or f"| `{path.name}` | {len(discarded)}" in named


def test_stock_as_a_graph_is_quoted_with_padding_alone_where_it_was_given_a_mask():
    rows = result_schema.read(readme.RESULTS / "nvidia-h200-2026-11-27.json")["rows"]
    graphed = [r for r in rows if r["contender"] == "stock sdpa, CUDA graphs" and r["median_s"]]
    assert {(r["status"], r["fill"] == 1) for r in graphed} == {("ok", False), ("discarded", True)}


def test_every_field_of_a_row_is_wanted_and_known():
    schema = result_schema.SCHEMA["$defs"]["row"]
    assert set(schema["required"]) == set(schema["properties"]) == set(result_schema.ROW)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.update(schema=1), "schema must be 2, got 1"),
        (lambda c: c.pop("schema"), "schema is missing"),
        (lambda c: c.pop("device"), "device is missing"),
        (lambda c: c["device"].update(cores="two"), 'device.cores must be integer, got "two"'),
        (lambda c: c["rows"][1].update(median_s="fast"), "rows[1].median_s must be number or null"),
        (lambda c: c["rows"][0].update(median_s=True), "rows[0].median_s must be number or null"),
        (lambda c: c["rows"][1].pop("error"), "rows[1].error is missing"),
        (lambda c: c["rows"][1].update(error={"max": 1}), "rows[1].error.rms is missing"),
        (lambda c: c["rows"][1].update(ci=[1.0]), "rows[1].ci must have 2 items, got 1"),
        (lambda c: c["rows"][0].update(speed=1), "rows[0].speed is not a field of schema 2"),
        (lambda c: c["rows"][0].update(status="good"), 'rows[0].status must be one of "ok", "F'),
        (lambda c: c.update(part="all"), 'part must be one of "bench"'),
        (lambda c: c.update(ceilings={"B": 1.0}), "ceilings.C is missing"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(change, said, tmp_path):
    broken = content(row("stock sdpa", 1.0), row("ours", 2.0))
    result_schema.check(broken)
    change(broken)
    path = saved(tmp_path / "a.json", broken)
    with pytest.raises(ValueError) as error:
        result_schema.read(path)
    assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    "text, said",
    [('{"schema": 2, "ro', "is not JSON"), ('{"schema": NaN}', "NaN is not a number of JSON")],
)
def test_what_is_not_json_is_said(text, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        result_schema.read(saved(tmp_path / "a.json", text))
    with pytest.raises(ValueError, match="cannot be read"):
        result_schema.read(tmp_path / "none.json")


def test_a_result_that_is_not_valid_is_not_written(tmp_path):
    found = results.Results(tmp_path / "a.json", content()["device"])
    found.add(rows=[row("stock sdpa", 1.0)])
    with pytest.raises(ValueError, match="median_s"):
        found.add(rows=[row("ours", 2.0, dtype="tf32", median_s=float("nan"))])
    assert len(result_schema.read(tmp_path / "a.json")["rows"]) == 1


def test_an_earlier_file_stays_until_there_is_a_row(tmp_path):
    path = saved(tmp_path / "a.json", content(row("ours", 2.0)))
    found = results.Results(path, content()["device"], quick=True, seconds=3.0)
    found.add(ceilings={"B": 1.0, "C": {}})
    assert result_schema.read(path)["rows"][0]["ratio_median"] == 2.0
    found.add(rows=[row("ours", 3.0)])
    written = result_schema.read(path)
    assert written["rows"][0]["ratio_median"] == 3.0
    assert (written["quick"], written["seconds"], written["ceilings"]["B"]) == (True, 3.0, 1.0)


def test_a_part_without_rows_is_written_at_once(tmp_path):
    found = results.Results(tmp_path / "a.json", content()["device"], "sanitize")
    found.add(sanitize=[])
    assert result_schema.read(tmp_path / "a.json")["sanitize"] == []


def test_what_a_run_depends_on_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "TABLES", tmp_path / "kernels" / "tuned")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "kernels" / "tuned").mkdir(parents=True)
    op = saved(tmp_path / "kernels" / "op.py", "1")
    device = content()["device"] | {"type": "cuda", "name": "NVIDIA H200"}
    first = results.environment(device)
    assert (first["OMP_WAIT_POLICY"], first["OMP_NUM_THREADS"]) == ("PASSIVE", None)
    assert first["tuned"] is None
    saved(tmp_path / "kernels" / "tuned" / "nvidia-h200.json", "{}")
    tuned = results.environment(device)
    assert tuned["tuned"] and tuned["sources"] == first["sources"]
    assert results.environment(content()["device"])["tuned"] is None
    saved(op, "2")
    assert results.environment(device)["sources"] != first["sources"]


def test_rows_take_the_place_of_those_of_the_same_workload_and_dtype():
    def told(found):
        return [(r["workload"], r["dtype"], r["ratio_median"]) for r in found.content["rows"]]

    found = results.Results(None, content()["device"])
    found.add(rows=[row("stock sdpa", 1.0), row("ours", 2.0)])
    found.add(rows=[row("ours", 3.0, dtype="tf32")])
    found.add(rows=[row("ours", 4.0, workload="other")])
    found.add(rows=[row("stock sdpa", 1.0), row("ours", 5.0), row("torch.compile", 6.0)])
    here = "base full-128", "float32"
    assert told(found) == [
        (*here, 1.0), (*here, 5.0), (*here, 6.0), ("base full-128", "tf32", 3.0),
        ("other", "float32", 4.0),
    ]  # fmt: skip
    found.add(complete=True)
    assert len(told(found)) == 5


# -- comparing ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "after, verdict, status",
    [
        (row("ours", 2.0), "same", 0),
        (row("ours", 1.9), "same", 0),  # the intervals meet
        (row("ours", 2.1), "same", 0),
        (row("ours", 1.7), "slower", 1),
        (row("ours", 2.5), "faster", 0),
        (row("ours", None, status="FAILED", reason="error 1"), "FAILED", 1),
        (row("ours", None, status="error", reason="OutOfMemoryError"), "lost", 1),
    ],
)
def test_only_what_is_beyond_its_interval_has_changed(
    after, verdict, status, tmp_path, capsys, monkeypatch
):
    a = saved(tmp_path / "a.json", content(row("stock sdpa", 1.0), row("ours", 2.0)))
    b = saved(tmp_path / "b.json", content(row("stock sdpa", 1.0), after))
    got, said, _ = run(capsys, monkeypatch, "compare", a, b)
    assert (got, verdict in said) == (status, True)
    (found,) = comparison.changes(*(json.loads(path.read_text())["rows"] for path in (a, b)))
    assert found["verdict"] == verdict


@pytest.mark.parametrize(
    "ratio, verdict", [(1.97, "same"), (1.95, "slower"), (2.03, "same"), (2.05, "faster")]
)
def test_within_two_percent_nothing_has_changed_however_narrow_the_intervals(ratio, verdict):
    rows = [[row("stock sdpa", 1.0), row("ours", x, spread=0.001)] for x in (2.0, ratio)]
    (found,) = comparison.changes(*rows)
    assert found["verdict"] == verdict


@pytest.mark.parametrize("contender, status", [("torch.compile", 0), ("ours, frozen", 1)])
@pytest.mark.parametrize(
    "after", [{"ratio": 1.0}, {"status": "FAILED"}, {"status": "error"}], ids=str
)
def test_a_rival_that_gets_worse_is_shown_and_no_regression(
    contender, status, after, tmp_path, capsys, monkeypatch
):
    a = saved(tmp_path / "a.json", content(row("stock sdpa", 1.0), row(contender, 2.0)))
    b = saved(tmp_path / "b.json", content(row("stock sdpa", 1.0), row(contender, **after)))
    got, said, _ = run(capsys, monkeypatch, "compare", a, b)
    assert (got, contender in said) == (status, True)
    assert f"{status} of ours worse" in said


@pytest.mark.parametrize(
    "after, said",
    [
        ([row("ours", status="skipped", reason="would run the stock forward: hooks")], "hooks"),
        ([], "has no row"),
        ([row("ours", None, ci=[0.4, 0.6])], "has no ratio"),  # the baseline was wrong
        ([row("ours", None, status="error", reason="not judged", sequences=None)], "not judged"),
    ],
)
def test_ours_without_a_ratio_now_is_lost(after, said, tmp_path, capsys, monkeypatch):
    a = saved(tmp_path / "a.json", content(row("stock sdpa", 1.0), row("ours", 2.0)))
    b = saved(tmp_path / "b.json", content(row("stock sdpa", 1.0), *after))
    status, told, _ = run(capsys, monkeypatch, "compare", a, b)
    assert (status, said in told, "1 of ours worse" in told) == (1, True, True)
    (found,) = comparison.changes(*(json.loads(path.read_text())["rows"] for path in (a, b)))
    assert found["verdict"] == "lost"


@pytest.mark.parametrize(
    "reason", ["the budget of 9 s is used up", "takes minutes to build, and time is short",
               "liger_kernel is not installed"],
)  # fmt: skip
def test_what_had_no_time_or_was_not_installed_is_no_regression(reason):
    before = [row("stock sdpa", 1.0), row("ours", 2.0)]
    after = [row("ours", status="skipped", reason=reason, sequences=None)]
    assert comparison.changes(before, after) == []


def test_a_rival_that_is_not_there_or_skipped_and_a_discarded_row_are_not_compared():
    before = [row("stock sdpa", 1.0), row("torch.compile", 2.0), row("ours", 2.0)]
    after = [row("stock sdpa", 1.0), row("ours", status="discarded", reason="?")]
    assert comparison.changes(before, after) == []
    after[1:] = [row("ours", 2.0), row("torch.compile", status="skipped", reason="?")]
    assert [c["contender"] for c in comparison.changes(before, after)] == ["ours"]


@pytest.mark.parametrize("times, on, verdict", [(1.4, "a", "same"), (1.6, "a", "inexact"),
                                                (1.6, "b", "same")])  # fmt: skip
def test_a_larger_error_on_the_same_inputs_is_a_regression_at_any_speed(times, on, verdict):
    rows = [
        [row("stock sdpa", 1.0), row("ours", 2.0, error={"max": x, "rms": x}, error_on=on)]
        for x, on in ((1e-6, "a"), (times * 1e-6, on))
    ]
    assert [c["verdict"] for c in comparison.changes(*rows)] == [verdict]
    rows[1][1] |= {"ratio_median": 3.0, "ratio_ci": [2.9, 3.1]}
    (found,) = comparison.changes(*rows)
    assert found["verdict"] == ("inexact" if verdict == "inexact" else "faster")


def test_what_fails_now_is_worse_also_if_it_had_no_ratio_before():
    before = [row("stock sdpa", 1.0), row("ours", None)]
    (found,) = comparison.changes(before, [row("ours", None, status="FAILED", reason="error 1")])
    assert found["verdict"] == "FAILED"


def test_other_numbers_of_sequences_are_not_compared():
    before, after = ([row("stock sdpa", 1.0), row("ours", 2.0, sequences=n)] for n in (32, 4))
    assert comparison.changes(before, after) == []


def test_without_an_interval_of_the_ratio_those_of_the_times_are_taken():
    rows = [row("stock sdpa", 1.0, ci=[0.9, 1.2]), row("ours", 2.0, ci=[0.5, 0.6], ratio_ci=None)]
    (found,) = comparison.changes(rows, rows)
    assert found["intervals"][0] == pytest.approx((1.5, 2.4))


def test_another_device_and_other_versions_are_noted(tmp_path, capsys, monkeypatch):
    a, b = (content(row("stock sdpa", 1.0), row("ours", 2.0)) for _ in range(2))
    b["device"] |= {"name": "another CPU", "threads": 4, "load": [38.2, 1.0, 1.0]}
    b["versions"]["torch"], b["versions"]["triton"] = "2.14", "3.8"
    b |= {"quick": True, "complete": False, "git commit": "abc", "seconds": 1.0}
    b["environment"] = {
        "OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": None, "sources": "12", "tuned": None
    }  # fmt: skip
    paths = saved(tmp_path / "a.json", a), saved(tmp_path / "b.json", b)
    _, said, _ = run(capsys, monkeypatch, "compare", *paths)
    assert "the device was a CPU, is another CPU" in said
    for told in (
        "torch was 2.13, is 2.14", "triton was None, is 3.8", "the number of threads was 2, is 4",
        "the load as it began was None, is 38", "the commit was None, is abc",
        "complete was True, is False", "quick was False, is True", "OMP_NUM_THREADS was None, is 4",
        "seconds was None, is 1.0",
    ):  # fmt: skip
        assert f"note: {told}" in said
    assert "OMP_WAIT_POLICY" not in said


def test_files_that_cannot_be_compared_are_named(tmp_path, capsys, monkeypatch):
    a = saved(tmp_path / "a.json", content(row("stock sdpa", 1.0), row("ours", 2.0)))
    old = saved(tmp_path / "old.json", content(schema=1))
    status, _, said = run(capsys, monkeypatch, "compare", a, old)
    assert (status, said) == (2, f"bench: {old}: schema must be 2, got 1\n")
    other = saved(tmp_path / "c.json", content(row("ours", 2.0, workload="large full-128")))
    status, _, said = run(capsys, monkeypatch, "compare", a, other)
    assert status == 2
    assert "have no row in common" in said


# -- plots ----------------------------------------------------------------------------------
def everything():
    """A file with points for each of the plots."""
    rows = [
        row(name, ratio, lengths=f"full-{S}", padded_to=S, workload=f"base full-{S}")
        for name, ratio in (("stock sdpa", 1.0), ("ours", 2.0))
        for S in (128, 256)
    ]
    rows += [
        row("ours", 4.0, lengths="squad-384", workload="base squad-384", fill=0.45),
        row("ours", 1.5, lengths="batch-1", workload="base batch-1", sequences=1),
        row("ours", 1.5, kind="op", lengths=None, workload="gelu", flops=1e6, bytes=2e6),
    ]
    return content(*rows, ceilings={"B": 1e9, "C": {"float32": 1e10}})


def test_each_plot_has_the_points_of_its_rows():
    data = plots.data_of(everything())
    assert data["throughput"]["series"]["ours"] == [[128, 200.0], [256, 200.0]]
    assert data["padding"]["series"]["ours"] == [[0.0, 1.5], [0.0, 2.0], [0.0, 2.0], [0.55, 4.0]]
    assert data["latency"]["series"]["ours"] == [[1, 1000 / 1.5], [32, 500.0]]
    assert data["roofline"]["series"]["ours"] == [[0.5, 1.5e6]]
    assert data["roofline"]["roof"] == [1e9, 1e10]
    assert plots.data_of(content(row("ours", 2.0))) == {}


@pytest.mark.parametrize(
    "lacks", ["lengths", "median_s", "bytes", "flops", "fill", "valid_tokens_per_s", "padded_to",
              "sequences", "ratio_median"],
)  # fmt: skip
def test_what_the_schema_allows_to_be_null_is_left_out_of_plots(lacks):
    thin = everything()
    for r in thin["rows"]:
        r[lacks] = None
    result_schema.check(thin)
    assert plots.data_of(thin).keys() < set(plots.PLOTS)


def test_a_dtype_without_a_ceiling_has_no_roofline():
    thin = everything()
    thin["ceilings"]["C"] = {"bfloat16": 1e10}
    result_schema.check(thin)
    assert "roofline" not in plots.data_of(thin)


def test_rows_that_failed_are_in_no_plot():
    failed = everything()
    for r in failed["rows"]:
        r["status"] = "FAILED"
    assert plots.data_of(failed) == {}


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="draws with matplotlib")
def test_a_picture_carries_the_digest_of_its_data(tmp_path):
    paths = plots.write(everything(), tmp_path, "it")
    assert len(paths) == len(plots.PLOTS)
    first = paths[0].read_text()
    assert plots.DIGEST.search(first)[1] == plots.digest(plots.data_of(everything())["throughput"])
    plots.write(everything(), tmp_path, "it")
    assert paths[0].read_text() == first


def test_plots_of_nothing_and_of_a_wrong_file_are_refused(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path / "a.json", content())
    status, _, said = run(capsys, monkeypatch, "plots", path)
    assert (status, "has no rows that a plot is made of" in said) == (2, True)
    status, _, said = run(capsys, monkeypatch, "plots", saved(path, content(schema=3)))
    assert (status, "schema must be 2, got 3" in said) == (2, True)


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path / "a.json", everything())
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    status, _, said = run(capsys, monkeypatch, "plots", path, "--folder", tmp_path)
    assert (status, 'pip install "bert_fast[plots]"' in said) == (2, True)


# -- the README -----------------------------------------------------------------------------
def test_the_readme_and_its_pictures_are_what_the_results_say():
    assert readme.stale() == [], "run `python bench readme` and commit what it prints"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A README and a page of its own, with one result: (the README's path, the result's)."""
    for name, path in (("RESULTS", "results"), ("PICTURES", "pictures")):
        (tmp_path / path).mkdir()
        monkeypatch.setattr(readme, name, tmp_path / path)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for name in ("README", "PAGE"):
        monkeypatch.setattr(readme, name, tmp_path / f"{name}.md")
        saved(tmp_path / f"{name}.md", f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    monkeypatch.setattr(readme.newest, "__defaults__", (tmp_path / "results",))
    error = {"max": 2e-6, "rms": 1e-6}
    rows = [
        row("stock sdpa", 1.0, error=error, baseline_error=error),
        row("ours", 2.0, error=error, baseline_error=error),
        row(
            "ours", 4.0, error=error, baseline_error=error, workload="base squad-384",
            lengths="squad-384", fill=0.5,
        ),
    ]  # fmt: skip
    return tmp_path / "README.md", saved(tmp_path / "results" / "cpu.json", content(*rows))


def test_the_readme_is_stale_as_soon_as_a_figure_changes(house, monkeypatch):
    text, path = house

    def draw(data, to):
        saved(to, f"<!-- data {plots.digest(data)} -->")

    monkeypatch.setattr(plots, "draw", draw)
    assert readme.stale() == ["README.md", "PAGE.md", "pictures/cpu-padding.svg"]
    readme.main(type("Options", (), {"check": False}), pytest.fail)
    assert readme.stale() == []
    printed = text.read_text()
    assert "| float32 | base full-128 | 1.00 | 2.0 (1.9 to 2.1) | 1.00 |" in printed
    page = text.with_name("PAGE.md").read_text()
    assert "| base full-128 | float32 | 1.00 | 2.0 (1.9 to 2.1) | 1.00 |" in page
    for whole in (printed, page):
        assert whole.startswith("before\n")
        assert whole.endswith("after\n")
    measured = json.loads(path.read_text())
    again = copy.deepcopy(measured)
    again["rows"][2]["ratio_median"] = 4.2
    saved(path, again)
    assert readme.stale() == ["README.md", "PAGE.md", "pictures/cpu-padding.svg"]
    saved(path, measured)
    saved(text, printed.replace("2.0 (1.9 to 2.1)", "3.0 (2.9 to 3.1)"))
    assert readme.stale() == ["README.md"]


def test_only_the_newest_file_of_a_device_and_its_dtypes_is_printed(house):
    _, path = house
    newer = json.loads(path.read_text()) | {"date": "2026-02-01T00:00:00+00:00"}
    saved(path.with_name("a-newer.json"), newer)
    saved(path.with_name("tests.json"), content(part="tests", date="2026-03-01T00:00:00+00:00"))
    assert [p.name for p, _ in readme.newest()] == ["a-newer.json"]
    half = json.loads(path.read_text())
    for r in half["rows"]:
        r["dtype"] = "bfloat16"
    saved(path.with_name("half.json"), half)
    assert [p.name for p, _ in readme.newest()] == ["half.json", "a-newer.json"]


def test_an_older_file_is_printed_for_what_no_newer_one_has(house):
    _, path = house
    newer = json.loads(path.read_text()) | {"date": "2026-02-01T00:00:00+00:00"}
    for r in newer["rows"]:
        r["workload"] = "base batch-1"
    saved(path.with_name("z-newer.json"), newer)
    assert [p.name for p, _ in readme.newest()] == [path.name, "z-newer.json"]


def test_a_contender_has_a_column_where_it_was_measured(house):
    _, path = house
    name = "stock sdpa, CUDA graphs"
    assert name in [model.name for model in contenders.MODELS]
    assert name not in readme.everything(readme.newest(), [])
    measured = json.loads(path.read_text())
    measured["rows"].append(row(name, 1.6))
    saved(path, measured)
    printed = readme.everything(readme.newest(), [])
    assert f"| stock sdpa | {name} |" in printed
    assert "| base full-128 | float32 | 1.00 | 2.0 (1.9 to 2.1) | 1.2 |" in printed  # 2.0 / 1.6


def test_the_readme_has_what_is_asked_for_of_the_newest_file(house):
    _, path = house
    newer = json.loads(path.read_text()) | {"date": "2026-02-01T00:00:00+00:00"}
    for r in newer["rows"]:
        r["workload"] = {"base full-128": "base full-128x8"}.get(r["workload"], "12x32 odd")
        r["ratio_median"] *= 3
    saved(path.with_name("z-newer.json"), newer)
    printed = readme.summary(readme.newest(), [])
    name = newer["device"]["name"]
    assert f"| {name} | float32 | base full-128x8 | 1.00 | 6.0" in printed  # by its whole name
    assert f"| {name} | float32 | base squad-384 | 0.50 | 4.0" in printed  # of the older one
    assert printed.count("full-128") == 1 and "odd" not in printed


def test_frozen_weights_have_a_column_where_they_were_measured(house):
    _, path = house
    assert "frozen" not in readme.everything(readme.newest(), [])
    measured = json.loads(path.read_text())
    error = measured["rows"][0]["error"]
    measured["rows"].append(row("ours, frozen", 3.0, error=error, baseline_error=error))
    saved(path, measured)
    printed = readme.everything(readme.newest(), [])
    assert "| stock sdpa | ours frozen, over stock sdpa |" in printed
    assert "| base full-128 | float32 | 1.00 | 2.0 (1.9 to 2.1) | 3.0 |" in printed
    assert "| base squad-384 | float32 | 0.50 | 4.0 (3.8 to 4.2) |  |" in printed


def test_smoke_tests_are_not_printed(house):
    _, path = house
    quick = json.loads(path.read_text()) | {"date": "2026-02-01T00:00:00+00:00", "quick": True}
    saved(path.with_name("z-newer.json"), quick)
    assert [p.name for p, _ in readme.newest()] == [path.name]


def test_pictures_stand_under_their_own_file():
    pictures = [Path(f"cpu{part}-padding.svg") for part in ("", "-quiet")]
    for path, picture in zip(("cpu.json", "cpu-quiet.json"), pictures, strict=True):
        (shown,) = readme._pictures_of(Path(path), pictures, Path("README.md"))
        assert shown.endswith(f"({picture})")


@pytest.mark.parametrize("rounds, told", [(5, "2.0"), (6, "2.0 (1.9 to 2.1)"), (None, "2.0")])
def test_fewer_than_six_rounds_have_no_interval(rounds, told):
    assert readme._times(row("ours", 2.0, rounds=rounds)) == told


@pytest.mark.parametrize("status", ["FAILED", "error"])
def test_what_failed_is_printed_in_place_of_what_passed_before(status, house):
    _, path = house
    newer = json.loads(path.read_text()) | {"date": "2026-02-01T00:00:00+00:00"}
    ours = row("ours", None, status=status, reason="RMS |error| 3")
    newer["rows"] = [row("stock sdpa", 1.0), ours]
    saved(path.with_name("z-newer.json"), newer)
    printed = readme.summary(readme.newest(), [])
    assert f"| float32 | base full-128 | 1.00 | {status} |  |" in printed
    assert "| float32 | base squad-384 | 0.50 | 4.0" in printed
    page = readme.everything(readme.newest(), [])
    assert f"| base full-128 | float32 | 1.00 | {status}: RMS \\|error\\| 3 |  |" in page
    again = json.loads(path.read_text()) | {"date": "2026-03-01T00:00:00+00:00"}
    saved(path.with_name("zz-newest.json"), again)
    assert [p.name for p, _ in readme.newest()] == ["zz-newest.json"]
    assert f"1.00 | {status} |" not in readme.summary(readme.newest(), [])


def on_gpu(path, date, stock, ours, rivals=(), full="base full-128"):
    """A file of a GPU: seconds of stock and of ours for a full batch, and for one sequence."""
    device = content()["device"] | {"type": "cuda", "name": "a GPU"}
    rows, error = [], {"max": 2e-6, "rms": 1e-6}
    for workload, sequences, n in ((full, 32, 0), ("base batch-1", 1, 1)):
        same = {
            "workload": workload, "lengths": workload.split()[1], "sequences": sequences,
            "error": error, "baseline_error": error,
        }  # fmt: skip
        times = {"stock sdpa": stock[n], **(dict.fromkeys(rivals, 1.0) if n else {})}
        for name, s in (times | {"ours": ours[n]}).items():
            rows.append(row(name, stock[n] / s, **same) | {"median_s": s})
    saved(path, content(*rows, device=device, date=f"{date}T00:00:00+00:00"))


def test_a_ratio_to_a_baseline_that_waits_for_its_host_is_not_in_the_readme(house):
    _, path = house
    on_gpu(path, "2026-02-01", stock=(8.0, 5.7), ours=(6.4, 1.0))
    on_gpu(path.with_name("z-slow-host.json"), "2026-02-02", stock=(9.4, 9.2), ours=(5.9, 1.0))
    printed = readme.summary(readme.newest(), [])
    assert "| a GPU | float32 | base full-128 | 1.00 | 1.2 (" in printed
    page = readme.everything(readme.newest(), [])
    assert "| base full-128 | float32 | 1.00 | 1.6 (1.5 to 1.7), host |" in page
    assert "| base full-128 | float32 | 1.00 | 1.2 (1.2 to 1.3) |" in page
    path.unlink()
    assert "full-128" not in readme.summary(readme.newest(), [])


def test_each_of_several_batches_is_compared_with_one_sequence(house):
    """A call of `squad-384` goes through four."""
    _, path = house
    for stock, told in ((4 * 6.0, False), (4 * 7.0, True)):
        on_gpu(path, "2026-02-01", (stock, 5.7), (4.0, 1.0), full="base squad-384")
        assert ("squad-384" in readme.summary(readme.newest(), [])) == told


def test_of_one_sequence_the_row_with_most_rivals_is_in_the_readme(house):
    _, path = house
    rivals = ("stock eager", "FlashAttention unpadded")
    on_gpu(path, "2026-02-01", stock=(8.0, 5.0), ours=(4.0, 1.0), rivals=rivals)
    on_gpu(path.with_name("newer.json"), "2026-02-02", stock=(8.0, 6.0), ours=(5.0, 1.0))
    printed = readme.summary(readme.newest(), [])
    assert "| a GPU | float32 | base batch-1 | 1.00 | 5.0 (" in printed
    assert "| a GPU | float32 | base full-128 | 1.00 | 1.6 (" in printed  # of the newer one
    on_gpu(path.with_name("z.json"), "2026-02-03", (8.0, 7.0), (5.0, 1.0), rivals)
    assert "| base batch-1 | 1.00 | 7.0 (" in readme.summary(readme.newest(), [])
