"""Rounds that were kept: results of tools/bench_peers.py, merged, as JSON that can be read and compared by lines."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
DIGITS = 5  # of a measured number: nothing here is known better


def read(paths: Iterable[Path]) -> list[Record]:
    """What all the files hold, merged."""
    return merged(result for path in paths for result in json.loads(path.read_text("utf-8")))


def merged(results: Iterable[Record]) -> list[Record]:
    """Results of the same model file, types of keys and values, and processor become one, in the order they come in."""
    alike: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for result in results:
        machine = result["machine"]
        alike[result["model"], *result["kv"], machine["processor"], machine["cores"]].append(result)
    return [joined(sorted(group, key=lambda result: result["date"])) for group in alike.values()]


def joined(results: list[Record]) -> Record:
    """Results of the same thing, ordered by date, as one with all their rounds."""
    work = dict(results[-1]["work"])
    for key in ("macs", "bytes"):  # by test
        work[key] = {name: n for result in results for name, n in result["work"][key].items()}
    return {
        **results[-1],
        "work": work,
        "date": results[0]["date"],
        **{key: {n: v for result in results for n, v in result.get(key, {}).items()} for key in ("engines", "about")},
        "is": versions(results),
        "rounds": different(lean(round, result["date"]) for result in results for round in result["rounds"]),
    }


def different(rounds: Iterable[Record]) -> list[Record]:
    """Each round once, so that what was merged before may be merged again."""
    return list({json.dumps(round, sort_keys=True): round for round in rounds}.values())


def versions(results: list[Record]) -> dict[str, list[str]]:
    """What each engine said that it is, in the order of the rounds."""
    found: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for name, texts in result.get("is", {}).items():
            found[name] += texts
        for process in (process for round in result["rounds"] for process in round["processes"]):
            if facts := process.get("is"):
                said = facts.get("engine", facts).items()
                found[process["engine"]].append(", ".join(f"{k} {v}" for k, v in said if k != "INFERENCE_NUM_THREADS"))
    return {name: list(dict.fromkeys(texts)) for name, texts in found.items()}


def lean(round: Record, date: str) -> Record:
    """A round with its date, without what the result says of all of them."""
    processes = [{k: v for k, v in process.items() if k != "is"} for process in round["processes"]]
    known: Record = _rounded({"date": date, **round, "processes": processes})
    return known


def text(results: list[Record]) -> str:
    """JSON, a line for each round and each other fact."""
    return "[" + ",\n".join(map(_result, results)) + "]\n"


def _result(result: Record) -> str:
    facts = [f"{json.dumps(key)}: {_line(value)}" for key, value in result.items() if key != "rounds"]
    kept = ",\n".join(_line(round) for round in result["rounds"])
    return "{" + ",\n".join([*facts, f'"rounds": [\n{kept}\n]']) + "}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
