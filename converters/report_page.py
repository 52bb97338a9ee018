"""A report as a page to look at: `page(report)`, one HTML text that needs nothing else, for light and for dark screens.

Whatever comes from a file (names, notes) is escaped. The page has no scripts and fetches nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from edgelm.formats import by_name
from edgelm.terminal import size

from .report_charts import Cell, bars, grid, shares

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --faint: #6d727c; --rule: #e4e2dd;
  --accent: #2457c5; --bad: #b3401f; --on: #ffffff;
  --s0: #2457c5; --s1: #d9822b; --s2: #2a9d74; --s3: #8a56c2; --s4: #c94f6d; --s5: #4aa3c7; --s6: #8d8a3a; --s7: #7b7f88; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161b; --card: #1c1f26; --ink: #e8e9ec; --faint: #9aa0ab;
  --rule: #2e323b; --accent: #7aa5ff; --bad: #ff9a76; --on: #10131a;
  --s0: #7aa5ff; --s1: #f0aa5c; --s2: #5ccaa2; --s3: #b894e8; --s4: #f08aa4; --s5: #7fcbe8; --s6: #c5c16d; --s7: #9aa0ab; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 2px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; } p { margin: 0 0 12px; } .faint, .faint a { color: var(--faint); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); gap: 12px; margin-top: 22px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; white-space: nowrap; font-size: 20px; font-weight: 600; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: 13px; }
.wide { overflow-x: auto; } svg { display: block; width: 100%; min-width: 640px; height: auto; }
svg text { font: 11px system-ui, "Segoe UI", sans-serif; fill: var(--ink); } svg .faint { fill: var(--faint); }
.end { text-anchor: end; } .mid { text-anchor: middle; } svg .on { fill: var(--on); } svg .off { fill: var(--ink); }
.cell, .bar { fill: var(--accent); } .rule { stroke: var(--rule); }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); }
.s4 { fill: var(--s4); } .s5 { fill: var(--s5); } .s6 { fill: var(--s6); } .s7 { fill: var(--s7); }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--faint); min-width: 130px; } th.n { min-width: 0; } .pairs th { width: 180px; } td.n, th.n { text-align: right; } ul { margin: 0; padding-left: 20px; }
summary { cursor: pointer; font-weight: 600; } code { font: 12px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
""".strip()  # noqa: E501


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, as `Report.to_dict` gives it."""
    name = re.split(r"[/\\]", str(report["out"]))[-1]
    body = "\n".join(_sections(report, name))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: what the conversion did</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(report: Mapping[str, Any], name: str) -> Iterator[str]:
    source = re.split(r"[/\\]", str(report["source"]))[-1]
    yield f"<h1>{escape(name)}</h1>"
    line = f"{report['type']} from {source}, {report['n_weights'] / 1e6:,.1f} M weights"
    yield f'<p class="faint">{escape(line)}</p>'
    yield _tiles(report)
    yield from _loss(report)
    yield from _layers(report["tensors"])
    what = "Bytes by type"
    yield _section(what, "What the file is made of.", shares(report["types"], what, size))
    yield from _transformations(report["transformations"])
    yield from _words(report)
    yield _table(report["tensors"])


def _section(title: str, text: str, content: str) -> str:
    faint = f'<p class="faint">{escape(text)}</p>' if text else ""
    return f'<section><h2>{escape(title)}</h2>{faint}<div class="wide">{content}</div></section>'


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = [(size(report["n_bytes"]), "size"), (f"{report['bits_per_weight']:.2f}", "bits per weight")]
    if loss := report["loss"]:
        tiles += [
            (f"{loss['mean_kl']:.4f}", "mean KL divergence, nats"),
            (f"{loss['kl_99']:.3f}", "KL, 99th percentile"),
            (f"{loss['ppl_ratio'] - 1:+.2%}", "perplexity"),
            (f"{loss['same_top']:.1%}", "same most probable token"),
            (f"{loss['rms_dp']:.2%}", "RMS change of probability"),
        ]
    boxes = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _loss(report: Mapping[str, Any]) -> Iterator[str]:
    loss = report["loss"]
    if not loss:
        text = "Not measured: no text was given (--eval, --calibrate), or the model predicts no tokens."
        yield _section("Loss", text, "")
        return
    kind = "kept back from calibration" if loss["is_held_out"] else "of its own"
    rows = [
        ("Text", f"{loss['text']}, {kind}: {loss['n_tokens']} tokens in {loss['n_chunks']} chunks of {loss['n_ctx']}"),
        ("Perplexity", f"{loss['perplexity']:.4f}, of the source {loss['base_perplexity']:.4f}"),
        ("Mean KL divergence", f"{loss['mean_kl']:.5f} ± {loss['mean_kl_stderr']:.5f}; median {loss['kl_median']:.5f}"),
        ("sha256 of the text", loss["text_sha256"]),
    ]  # fmt: skip
    if calibration := report["calibration"]:
        rows.append(("Calibrated on", f"{calibration['text']}, sha256 {calibration['text_sha256']}"))
    yield _section("Loss against the source", "", _pairs(rows))


def _layers(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The charts of layers: errors and bits, one cell for each tensor."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for t in tensors:
        match = re.fullmatch(r"blk\.(\d{1,4})\.([\w.]+)\.weight", t["tensor"])
        if match and len(t["shape"]) > 1:
            found.setdefault(match[2], {})[int(match[1])] = t
    if not found:
        return
    n_layers = 1 + max(i for row in found.values() for i in row)
    if any(t["error"] is not None for t in tensors):
        yield _section(
            "Loss by layer",
            "Relative error of all weights of a layer: root of the mean squared error over that of the weights.",
            bars([_layer_error(found, i) for i in range(n_layers)], "Loss by layer", lambda e: f"{e:.2%}", "layer"),
        )
        top = max((t["error"] or 0.0 for row in found.values() for t in row.values()), default=0.0) or 1.0
        cells = {k: {i: _error_cell(t, top) for i, t in row.items()} for k, row in found.items()}
        text = f"Relative error of each tensor, columns weighed as the text drives them; full colour is {top:.2%}."
        yield _section("Loss by tensor", text, grid(cells, n_layers, "Loss by tensor"))
    cells = {kind: {i: _bits_cell(t) for i, t in row.items()} for kind, row in found.items()}
    yield _section("Bits by tensor", "Real bits per weight, scales included.", grid(cells, n_layers, "Bits by tensor"))


def _layer_error(found: Mapping[str, Mapping[int, Mapping[str, Any]]], layer: int) -> float:
    tensors = [row[layer] for row in found.values() if layer in row]
    counts = [math.prod(t["shape"]) for t in tensors]
    squares = sum(n * (t["error"] or 0.0) ** 2 for n, t in zip(counts, tensors, strict=True))
    return math.sqrt(squares / max(1, sum(counts)))


def _error_cell(t: Mapping[str, Any], top: float) -> Cell:
    error = t["error"] or 0.0
    return Cell(error / top, f"{100 * error:.1f}", f"{t['tensor']}: {error:.3%}, {t['to']}, {t['method'] or 'rtn'}")


def _bits_cell(t: Mapping[str, Any]) -> Cell:
    bits = 8 * t["n_bytes"] / math.prod(t["shape"])
    instead = f" instead of {t['fallback_from']}" if t["fallback_from"] else ""
    return Cell((bits - 1) / 8, f"{bits:.1f}", f"{t['tensor']}: {bits:.2f} bits, {t['to']}{instead}")


def _transformations(facts: Mapping[str, Any]) -> Iterator[str]:
    titles = {"pruned": "Pruning", "lora": "Adapters", "awq": "Scales folded into what feeds them"}
    for key, value in facts.items():
        entries = value if isinstance(value, list) else [value]
        rows = [pair for entry in entries for pair in _flat(entry)]
        yield _section(titles.get(key, key), "", _pairs(rows))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts as (name, text), long ones left to the JSON."""
    if isinstance(value, Mapping) and len(value) <= 24:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix} {key}".strip().replace("_", " "))
    elif isinstance(value, Mapping):
        yield prefix, f"{len(value)} entries, see the report in JSON"
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield prefix, text if len(text) < 400 else f"{text[:400]} …"


def _words(report: Mapping[str, Any]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for text in report["fallbacks"]:
        name, _, change = text.partition(": ")
        groups.setdefault(change, []).append(name)
    if groups:
        rows = [(change, f"{len(names)} tensors: {', '.join(_kinds(names))}") for change, names in groups.items()]
        yield _section("Fallbacks", "Tensors whose rows the blocks of the wanted type do not divide.", _pairs(rows))
    if report["notes"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in report["notes"])
        yield _section("Notes", "", f"<ul>{items}</ul>")


def _kinds(names: Sequence[str]) -> list[str]:
    """Names of tensors, those of layers together: "ffn_up (30 layers)"."""
    counts: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"^blk\.\d+\.|\.weight$", "", name) if name.startswith("blk.") else name
        counts[kind] = counts.get(kind, 0) + 1
    return [kind if n == 1 else f"{kind} ({n} layers)" for kind, n in counts.items()]


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<table class="pairs">{lines}</table>'


def _table(tensors: Sequence[Mapping[str, Any]]) -> str:
    head = '<tr><th>Tensor</th><th class="n">Shape</th><th>From</th><th>To</th><th>Method</th><th class="n">Error</th>'
    lines = [f'{head}<th class="n">Bits</th><th class="n">Bytes</th></tr>']
    for t in tensors:
        error = "" if t["error"] is None else f"{t['error']:.3%}"
        bits = by_name(t["to"]).bits_per_weight()
        cells = (
            f"<code>{escape(t['tensor'])}</code>", *map(escape, (" × ".join(map(str, t["shape"])), t["from"], t["to"])),
            escape(t["method"] or ""), error, f"{bits:.2f}", f"{t['n_bytes']:,}",
        )  # fmt: skip
        classes = ("", "n", "", "", "", "n", "n", "n")
        row = "".join(f'<td class="{k}">{c}</td>' for k, c in zip(classes, cells, strict=True))
        lines.append(f"<tr>{row}</tr>")
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f"<section><details><summary>All {len(tensors)} tensors</summary>{table}</details></section>"
