"""The tables of README.md and docs/benchmarks.md are what tools/bench_peers.py makes of the rounds that were kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelm import bench
from edgelm.kernels import matrix_unit

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

from peers import rounds, tables  # noqa: E402

Record = dict[str, Any]
ROOFS = {"read": 20e9, "int8": 200e9, "float32": 50e9, "unit": 0.0}


def round_of(speeds: dict[str, float], failed: tuple[str, ...] = (), **roofs: float) -> Record:
    """Prompts of 10 tokens on one thread, at a speed for each engine."""
    who = {"n_threads": 1}
    return {
        "roofs": {"1": ROOFS | roofs},
        "speeds": [
            {"engine": e, "n_prompt": 10, "n_gen": 0, "n_depth": 0, "avg_ts": v} | who for e, v in speeds.items()
        ],
        "processes": [
            {"engine": e, "peak": 2e8, "start_s": 0.5, "is": {"version": e.upper()}} | who for e in speeds
        ],
        "failed": dict.fromkeys(failed, "exit 1: no"),
    }  # fmt: skip


def result(*found: Record, model: str = "m.gguf", date: str = "2026-01-02", **facts: Any) -> Record:
    engines = {r["engine"] for round in found for r in round["speeds"]}
    return {
        "model": model,
        "work": {"type": "Q8_0", "peak": "int8", "macs": {"10": 1e10}, "bytes": {}},
        "kv": ["f16", "f16"],
        "date": f"{date}T00:00:00Z",
        "machine": {"processor": "P", "cores": 2, "system": "Linux"},
        "engines": dict.fromkeys(engines, "command"),
        "rounds": list(found),
    } | facts  # fmt: skip


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_ratios_are_taken_within_a_round() -> None:
    found = [round_of({"edgelm": a, "b": b}) for a, b in ((100.0, 50.0), (10.0, 2.0), (40.0, 10.0))]
    row = rows(tables.speeds(rounds.merged([result(*found)])))[2]
    assert row == ["m", "prompt of 10", "1", "40.0", "10.0", "4.00 (2.00 … 5.00)", "40 G MAC/s", "20%"]


def test_results_of_one_model_are_one_row_in_the_order_of_their_dates() -> None:
    later, first = result(round_of({"edgelm": 3.0}), date="2026-01-05"), result(round_of({"edgelm": 1.0}))
    other = result(round_of({"edgelm": 9.0}), model="n.gguf")
    merged = rounds.merged([later, other, first])
    assert [r["model"] for r in merged] == ["m.gguf", "n.gguf"]
    assert [round["speeds"][0]["avg_ts"] for round in merged[0]["rounds"]] == [1.0, 3.0]
    assert "- P, 2 cores, Linux, 2026-01-02 to 2026-01-05, 1 to 2 rounds" in tables.notes(merged)
    assert rounds.merged([*merged, later]) == merged == json.loads(rounds.text(merged))


def test_an_engine_that_failed_is_told_from_one_that_was_not_run() -> None:
    found = [result(round_of({"edgelm": 2.0, "b": 1.0})), result(round_of({"edgelm": 2.0}, ("b",)), model="n.gguf"),
             result(round_of({"edgelm": 2.0}), model="o.gguf")]  # fmt: skip
    text = tables.markdown(rounds.merged(found))
    assert [row[4:6] for row in rows(text)[2:5]] == [["1.0", "2.00"], ["fails", "–"], ["–", "–"]]
    assert "- n: b: exit 1: no" in text


@pytest.mark.parametrize(
    ("type", "n_prompt", "unit", "expected"),
    [("Q8_0", 512, 0, 200e9), ("F16", 512, 0, 100e9), ("F32", 512, 0, 50e9), ("F16", 512, 9e11, 9e11),
     ("Q8_0", 31, 9e11, 200e9), ("Q8_0", 0, 9e11, 20e9)],
)  # fmt: skip
def test_a_test_is_held_to_what_it_goes_through(type: str, n_prompt: int, unit: float, expected: float) -> None:
    work = {"type": type, "peak": "float32" if type[0] == "F" else "int8"}
    assert tables.roof(work, n_prompt, ROOFS | {"unit": unit}) == expected
    assert tables.LEAST_OF_UNIT == matrix_unit.LEAST


def test_what_is_said_stands_for_versions_and_names() -> None:
    said = result(round_of({"edgelm": 2.0, "b": 1.0}), about={"b": "from its sources", "m": "Model M"})
    text = tables.markdown(rounds.merged([said]))
    assert "- b: from its sources" in text and "- edgelm: version EDGELM" in text and "| Model M |" in text


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_pages_show_the_rounds_that_were_kept(name: str) -> None:
    page = (ROOT / name).read_text("utf-8")
    assert page.count("<!-- rounds:") == page.count("<!-- end -->") == len(tables.BLOCK.findall(page))
    assert tables.update(page, ROOT / "docs" / "rounds") == page


def test_a_block_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(rounds.text(rounds.merged([result(round_of({"edgelm": 2.0}))])), "utf-8")
    page = "x\n<!-- rounds: a.json as: short -->\nold\n<!-- end -->\ny\n<!-- rounds: b.json -->\nkept\n<!-- end -->\n"
    new = tables.update(page, tmp_path)
    assert "old" not in new and "kept" in new and "| m | 1 | 2.0 |" in new
    assert tables.update(new, tmp_path) == new


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [(("32K", "1M", "480M"), None, 1920), (("32K", "32768K"), None, 512), ((), None, 512), (("480M",), 4 << 30, 1024)],
)  # fmt: skip
def test_memory_is_measured_beyond_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...], free: int | None, expected: int
) -> None:
    for i, size in enumerate(sizes):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(bench, "CACHES", tmp_path)
    monkeypatch.setattr(bench, "free_memory", lambda: free)
    assert bench.beyond_caches() == expected << 20
