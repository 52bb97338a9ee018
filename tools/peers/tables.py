"""Tables of kept rounds: edgelm beside each of its peers, and beside what the machine can do.

A cell holds a figure for each number of threads, in the order of the column "threads". Speeds are medians over the
rounds; a ratio is one of speeds of the same round, its median, and the smallest and the largest if there are several.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import rounds

Record = dict[str, Any]
Test = tuple[int, int, int]  # prompt tokens, generated tokens, depth
Speeds = dict[str, list[float | None]]  # tokens/s by engine, one of each round; None where it has none
BLOCK = re.compile(r"(<!-- rounds: (?P<files>[^>]*?)(?P<short> as: short)? -->\n).*?(<!-- end -->)", re.DOTALL)
LEAST_OF_UNIT = 32  # tokens of a prompt that go through a matrix unit: edgelm.kernels.matrix_unit.LEAST
NOT_RUN, FAILED = "–", "fails"


@dataclass(frozen=True)
class Tests:
    """The lengths that were asked for."""

    prompts: list[int]
    gens: list[int]
    depths: list[int]

    @classmethod
    def of(cls, *texts: str) -> Tests:
        return cls(*([int(part) for part in text.split(",") if part and int(part) >= 0] for text in texts))


def update(page: str, folder: Path) -> str:
    """A Markdown page whose blocks show the rounds in `folder` that they name; one without rounds stays as it is."""

    def block(match: re.Match[str]) -> str:
        paths = [folder / name for name in match["files"].split()]
        if not all(path.exists() for path in paths):
            return match[0]
        return f"{match[1]}\n{(short if match['short'] else markdown)(rounds.read(paths))}\n\n{match[4]}"

    return BLOCK.sub(block, page)


def markdown(results: list[Record]) -> str:
    """All tables of some merged results, and what they were measured on."""
    parts = [speeds(results), processes(results), "\n".join(notes(results))]
    return "\n\n".join(part for part in parts if part)


def short(results: list[Record]) -> str:
    """Speeds alone, a row for each model, and what they were measured on."""
    tests = list(dict.fromkeys(test for result in results for test in by_test(result)))
    engines = ["edgelm", *peers(results)]
    head = ["model", "threads", *(f"{name(t)}: {e}" if e == "edgelm" else e for t in tests for e in engines)]
    lines = []
    for result in results:
        threads, found = threads_of(result), by_test(result)
        cells = [speed_cell(result, found.get(test, {}), threads, engine) for test in tests for engine in engines]
        lines.append([title(result), joined(threads), *cells])
    return "\n\n".join([table(head, lines, 2), "\n".join(notes(results))])


def peers(results: list[Record]) -> list[str]:
    """Engines beside edgelm that gave figures for some model."""
    found = (r["engine"] for result in results for round in result["rounds"] for r in round["speeds"])
    return [engine for engine in dict.fromkeys(found) if engine != "edgelm"]


def by_test(result: Record) -> dict[Test, dict[int, Speeds]]:
    """Speeds by test and number of threads; prompts first."""
    found: dict[Test, dict[int, Speeds]] = defaultdict(lambda: defaultdict(dict))
    n_rounds = len(result["rounds"])
    for i, round in enumerate(result["rounds"]):
        for r in round["speeds"]:
            engines = found[r["n_prompt"], r["n_gen"], r["n_depth"]][r["n_threads"]]
            engines.setdefault(r["engine"], [None] * n_rounds)[i] = r["avg_ts"]
    return dict(sorted(found.items(), key=lambda item: (item[0][1] > 0, item[0])))


def threads_of(result: Record) -> list[int]:
    return sorted({r["n_threads"] for round in result["rounds"] for r in round["speeds"]})


def speeds(results: list[Record]) -> str:
    """One row for each model and test."""
    others = peers(results)
    head = ["model", "test", "threads", "edgelm", *(column for e in others for column in (e, f"edgelm / {e}"))]
    lines = []
    for result in results:
        for test, found in by_test(result).items():
            threads = sorted(t for t in found if "edgelm" in found[t])
            if not threads:
                continue
            cells = [speed_cell(result, found, threads, "edgelm")]
            for engine in others:
                cells.append(speed_cell(result, found, threads, engine))
                cells.append(joined(ratio(ratios(found[t], engine)) for t in threads))
            lines.append([title(result), name(test), joined(threads), *cells, *rates(result, test, found, threads)])
    return table([*head, "edgelm does", "of roof"], lines, 3)


def speed_cell(result: Record, found: dict[int, Speeds], threads: list[int], engine: str) -> str:
    """The median of an engine's speeds with each number of threads."""
    without = FAILED if any(engine in round["failed"] for round in result["rounds"]) else NOT_RUN
    middles = [middle(found.get(t, {}).get(engine, [])) for t in threads]
    return joined(without if value is None else number(value) for value in middles)


def ratios(found: Speeds, engine: str) -> list[float]:
    """Of edgelm to another engine, in each round that has both."""
    pairs = zip(found["edgelm"], found.get(engine, []), strict=False)
    return [ours / theirs for ours, theirs in pairs if ours and theirs]


def ratio(values: list[float]) -> str:
    if not values:
        return NOT_RUN
    text = f"{statistics.median(values):.2f}"
    return f"{text} ({min(values):.2f} … {max(values):.2f})" if len(values) > 1 else text


def rates(result: Record, test: Test, found: dict[int, Speeds], threads: list[int]) -> tuple[str, str]:
    """Bytes read or multiply-adds a second of edgelm, and the share of what the machine did in the same round."""
    n_prompt, n_gen, depth = test
    work = result["work"]
    amount = work["macs"].get(str(n_prompt), 0) / n_prompt if n_prompt else work["bytes"].get(f"{n_gen}@{depth}", 0)
    if not amount:
        return NOT_RUN, NOT_RUN
    does, shares = [], []
    for t in threads:
        pairs = [(v, r["roofs"]) for v, r in zip(found[t]["edgelm"], result["rounds"], strict=True) if v is not None]
        does.append(statistics.median(v for v, _ in pairs) * amount / 1e9)
        shares.append(statistics.median(v * amount / roof(work, n_prompt, roofs[str(t)]) for v, roofs in pairs))
    unit, digits = ("G MAC/s", 0) if n_prompt else ("GB/s", 1)
    return f"{joined(f'{value:.{digits}f}' for value in does)} {unit}", joined(f"{share:.0%}" for share in shares)


def roof(work: Record, n_prompt: int, measured: Record) -> float:
    """What a machine can do of that which a test goes through: bytes or multiply-adds a second.

    Rounds without a figure for products of int16 are of machines where they are int8's, half as many to a vector.
    """
    if not n_prompt:
        return float(measured["read"])
    if n_prompt >= LEAST_OF_UNIT and measured.get("unit"):
        return float(measured["unit"])
    kind = products(work)
    return float(measured[kind] if kind in measured else measured["int8"] / 2)


def products(work: Record) -> str:
    """What prompts are multiplied as: "int8", "int16", "float32".

    Rounds that know "peak" alone call float16 float32; they are of x86, which multiplies it as int16.
    """
    return work.get("products") or ("int16" if work["type"] in ("F16", "BF16") else work["peak"])


def processes(results: list[Record]) -> str:
    """Peak memory of the process that ran the tests, and seconds of one that loads the file and computes one token."""
    engines = ["edgelm", *peers(results)]
    lines = []
    for result in results:
        threads = threads_of(result)
        cells = [process_cell(result, threads, engine) for engine in engines]
        lines.append([title(result), joined(threads), *cells])
    return table(["model", "threads", *(f"{engine}: peak; start" for engine in engines)], lines, 2)


def process_cell(result: Record, threads: list[int], engine: str) -> str:
    """The peak with the most threads, the start with each number of them."""
    found = [r for round in result["rounds"] for r in round["processes"] if r["engine"] == engine]
    if not found:
        return FAILED if any(engine in round["failed"] for round in result["rounds"]) else NOT_RUN
    peak = middle([r["peak"] for r in found if r["n_threads"] == threads[-1]])
    starts = [middle([r["start_s"] for r in found if r["n_threads"] == t]) for t in threads]
    seconds = joined(NOT_RUN if value is None else f"{value:.2f}" for value in starts)
    return (f"{peak / 1e6:.0f} MB; " if peak else "") + f"{seconds} s"


def notes(results: list[Record]) -> list[str]:
    """What could not be compared, the machine and the days, its roofs, versions."""
    failed = {(title(r), name): why for r in results for round in r["rounds"] for name, why in round["failed"].items()}
    lines = [f"- {model}: {engine}: {why}" for (model, engine), why in failed.items()]
    machines = {(r["machine"]["processor"], r["machine"]["cores"], r["machine"]["system"]) for r in results}
    for processor, cores, system in sorted(machines):
        lines.append(f"- {processor}, {cores} cores, {system}, {days(results)}, {counts(results)}")
    return [*lines, *machine_itself(results), *said_of_engines(results)]


def days(results: list[Record]) -> str:
    dates = sorted(round["date"][:10] for result in results for round in result["rounds"])
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def counts(results: list[Record]) -> str:
    """How many rounds the rows have."""
    numbers = sorted(
        sum(value is not None for value in found["edgelm"])
        for result in results for tests in by_test(result).values() for found in tests.values() if "edgelm" in found
    )  # fmt: skip
    least, most = numbers[0], numbers[-1]
    return f"{most} round{'s' * (most > 1)}" if least == most else f"{least} to {most} rounds"


def machine_itself(results: list[Record]) -> Iterable[str]:
    roofs: dict[str, list[Record]] = defaultdict(list)
    for round in (round for result in results for round in result["rounds"]):
        for threads, measured in round["roofs"].items():
            roofs[threads].append(measured)
    for threads, measured in sorted(roofs.items(), key=lambda item: int(item[0])):
        read = [m["read"] / 1e9 for m in measured]
        kinds = [kind for kind in ("int8", "int16", "float32") if all(kind in m for m in measured)]
        peaks = [f"{statistics.median(m[kind] for m in measured) / 1e9:.0f} G {kind}" for kind in kinds]
        text = f"- the machine itself, {threads} thread{'s' * (threads != '1')}: "
        text += f"reads {statistics.median(read):.1f} ({min(read):.1f} … {max(read):.1f}) GB/s, "
        text += f"{', '.join(peaks[:-1])} and {peaks[-1]} multiply-adds/s"
        if unit := statistics.median(m.get("unit", 0) for m in measured) / 1e9:
            text += f"; its matrix unit {unit:.0f} G of bfloat16"
        yield text


def said_of_engines(results: list[Record]) -> Iterable[str]:
    """What was said about an engine, or else what it says itself."""
    told = {engine: said for result in results for engine, said in result.get("about", {}).items()}
    own: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for engine, texts in result["is"].items():
            own[engine] += texts
    for engine, texts in own.items():
        yield f"- {engine}: " + (told.get(engine) or "; ".join(dict.fromkeys(texts)))


def title(result: Record) -> str:
    """What the model was called, or else its file's name; types of keys and values that are not float16."""
    keys, values = result["kv"]
    stem = result["model"].removesuffix(".gguf")
    kind = "" if keys == values == "f16" else f", KV {keys}" if keys == values else f", KV {keys} and {values}"
    return result.get("about", {}).get(stem, stem) + kind


def name(test: Test) -> str:
    n_prompt, n_gen, depth = test
    return (f"prompt of {n_prompt}" if n_prompt else f"generate {n_gen}") + (f" after {depth}" if depth else "")


def middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def joined(parts: Iterable[object]) -> str:
    """Figures of each number of threads; once if there are none."""
    texts = [str(part) for part in parts]
    return texts[0] if set(texts) in ({NOT_RUN}, {FAILED}) else ", ".join(texts)


def table(head: list[str], lines: list[list[str]], n_left: int) -> str:
    """Markdown, the first columns to the left; empty without lines."""
    rule = ["---"] * n_left + ["---:"] * (len(head) - n_left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines]) if lines else ""
