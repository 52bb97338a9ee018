"""Tables of kept rounds: edgelm beside the faster of its peers at each point, and beside what the machine can do."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Key = tuple[int, int, int, int]  # prompt tokens, generated tokens, depth, threads


@dataclass(frozen=True)
class Tests:
    """The lengths that were asked for."""

    prompts: list[int]
    gens: list[int]
    depths: list[int]

    @classmethod
    def of(cls, *texts: str) -> Tests:
        return cls(*([int(part) for part in text.split(",") if part and int(part) >= 0] for text in texts))


def markdown(results: list[Record]) -> str:
    """All tables of some results of tools/bench_peers.py, and what they were measured on."""
    peers = list(dict.fromkeys(name for result in results for name in names(result) if name != "edgelm"))
    parts = [speeds(results, peers), processes(results, ["edgelm", *peers]), "\n".join(notes(results))]
    return "\n\n".join(part for part in parts if part)


def names(result: Record) -> list[str]:
    """Engines that gave figures."""
    return list(dict.fromkeys(r["engine"] for round in result["rounds"] for r in round["speeds"]))


def by_test(result: Record) -> dict[Key, dict[str, list[float | None]]]:
    """Tokens/s by test, engine and round; None where an engine has none in a round."""
    found: dict[Key, dict[str, list[float | None]]] = defaultdict(dict)
    n_rounds = len(result["rounds"])
    for i, round in enumerate(result["rounds"]):
        for r in round["speeds"]:
            key = (r["n_prompt"], r["n_gen"], r["n_depth"], r["n_threads"])
            found[key].setdefault(r["engine"], [None] * n_rounds)[i] = r["avg_ts"]
    return dict(sorted(found.items(), key=lambda item: (item[0][1] > 0, item[0])))


def middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def rate(result: Record, key: Key, speeds: list[float | None]) -> tuple[str, float] | None:
    """(GB/s or multiply-adds/s, share of what the machine reached in the same round) of edgelm in a test."""
    n_prompt, n_gen, depth, threads = key
    work = result["work"]
    if n_prompt:
        amount, roof = work["macs"].get(str(n_prompt), 0) / n_prompt, work["peak"]
    else:
        amount, roof = work["bytes"].get(f"{n_gen}@{depth}", 0), "read"
    measured = [round["roofs"][str(threads)] for round in result["rounds"]]
    unit = "unit" if n_prompt else roof  # what prompts go through, where there is one
    roofs = [m.get(unit) or m[roof] for m in measured]
    shares = [speed * amount / limit for speed, limit in zip(speeds, roofs, strict=True) if speed is not None]
    speed = middle(speeds)
    if speed is None or not amount:
        return None
    does = speed * amount / 1e9
    return f"{does:.0f} G MAC/s" if n_prompt else f"{does:.1f} GB/s", statistics.median(shares)


def speeds(results: list[Record], peers: list[str]) -> str:
    """One row for each model, test and number of threads."""
    head = ["model", "test", "threads", "edgelm", *peers, "edgelm / the faster (min … max)", "edgelm does", "of roof"]
    lines = [row(head), row(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for result in results:
        for key, found in by_test(result).items():
            n_prompt, n_gen, depth, threads = key
            test = (f"prompt of {n_prompt}" if n_prompt else f"generate {n_gen}") + (f" after {depth}" if depth else "")
            if "edgelm" not in found:
                continue
            cells = [f"{value:.1f}" if (value := middle(found.get(name, []))) else "–" for name in ["edgelm", *peers]]
            does = rate(result, key, found["edgelm"])
            last = [does[0], f"{does[1]:.0%}"] if does else ["–", "–"]
            lines.append(row([title(result), test, str(threads), *cells, against_faster(found), *last]))
    return "\n".join(lines) if len(lines) > 2 else ""


def against_faster(found: dict[str, list[float | None]]) -> str:
    """The median ratio, within a round, of edgelm to the peer with the higher median."""
    peers = {name: value for name, values in found.items() if name != "edgelm" and (value := middle(values))}
    if not peers:
        return "–"
    faster = max(peers, key=lambda name: peers[name])
    pairs = zip(found["edgelm"], found[faster], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
    if not ratios:
        return "–"
    name = f" {faster}" if len(peers) > 1 else ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}){name}"


def processes(results: list[Record], engines: list[str]) -> str:
    """Peak memory of the process that ran the tests, and seconds of one that loads the file and computes one token."""
    lines = [row(["model", "threads", *(f"{name}: peak, start" for name in engines)])]
    lines.append(row(["---", "---", *["---:"] * len(engines)]))
    for result in results:
        found: dict[tuple[int, str], list[Record]] = defaultdict(list)
        for round in result["rounds"]:
            for r in round["processes"]:
                found[r["n_threads"], r["engine"]].append(r)
        for threads in sorted({key[0] for key in found}):
            cells = [cell(found.get((threads, name), [])) for name in engines]
            lines.append(row([title(result), str(threads), *cells]))
    return "\n".join(lines) if len(lines) > 2 else ""


def cell(records: list[Record]) -> str:
    if not records:
        return "–"
    peak, start = middle([r["peak"] for r in records]), middle([r["start_s"] for r in records])
    return (f"{peak / 1e6:.0f} MB, " if peak else "") + f"{start:.2f} s"


def notes(results: list[Record]) -> list[str]:
    """What could not be compared, the machine and the day, its roofs, versions: each once."""
    lines, versions, roofs = [], {}, defaultdict(list)
    for result in results:
        for round in result["rounds"]:
            lines += [f"- {title(result)}: {name}: {why}" for name, why in round["failed"].items()]
            versions |= {r["engine"]: r["is"] for r in round["processes"]}
            for threads, measured in round["roofs"].items():
                roofs[threads].append(measured)
    for result in results:
        host = result["machine"]
        where = f"{host['processor']}, {host['cores']} cores, {host['system']}"
        lines.append(f"- {where}, {result['date'][:10]}, {len(result['rounds'])} rounds")
    for threads, measured in roofs.items():
        best = {name: statistics.median(m[name] for m in measured) / 1e9 for name in ("read", "int8", "float32")}
        rates = f"{best['int8']:.0f} G int8 and {best['float32']:.0f} G float32 multiply-adds/s"
        if unit := statistics.median(m.get("unit", 0) for m in measured) / 1e9:
            rates += f"; its matrix unit {unit:.0f} G of bfloat16"
        lines.append(f"- the machine itself, {threads} threads: reads {best['read']:.1f} GB/s, {rates}")
    for name, found in versions.items():
        lines.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in found.get("engine", found).items()))
    return list(dict.fromkeys(lines))


def title(result: Record) -> str:
    """The model as a reader knows it; random weights by their file, for they have no other name."""
    kv = "" if result["kv"] == ["f16", "f16"] else f", KV {result['kv'][0]}"
    return result["model"].removesuffix(".gguf") + kv


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
