"""The page of a report: whole, safe to open, and true to the figures."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hf_folder
import pytest
from test_pipeline import asked

from converters.pipeline import convert
from converters.recipe import Recipe
from converters.report_page import page

VOID = {"meta", "rect", "line", "br"}


class Checked(HTMLParser):
    """That every element is closed where it should be, and what the page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "srcset", "action", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(html: str) -> Checked:
    parser = Checked()
    parser.feed(html)
    parser.close()
    assert not parser.open and "script" not in parser.tags and "url(" not in html and "@import" not in html
    return parser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(a report, its page) of a pruned and quantized model."""
    folder = tmp_path_factory.mktemp("report")
    options = asked(folder, prune=("ffn=25%",), method="imatrix", html=folder / "page.html")
    report = convert(hf_folder.write(folder, "llama-gqa"), folder / "out.gguf", Recipe("q4_k_m"), options)
    return report.to_dict(), (folder / "page.html").read_text()


def test_the_page_shows_what_the_report_says(made: tuple[dict[str, Any], str]) -> None:
    report, html = made
    assert html == page(report)
    shown = checked(html)
    assert shown.tags.count("svg") == 4
    assert f"{report['loss']['mean_kl']:.4f}" in shown.text and f"{report['loss']['kl_99']:.3f}" in shown.text
    assert f"{report['bits_per_weight']:.2f}" in shown.text and report["loss"]["text_sha256"] in shown.text
    for tensor in report["tensors"]:
        assert tensor["tensor"] in shown.text
    assert "Pruning" in shown.text and "Fallbacks" in shown.text and "Q4_K -> Q5_0" in shown.text


def test_names_cannot_run(made: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    report = {
        **made[0], "source": evil, "out": evil, "notes": [evil], "fallbacks": [f"{evil}: {evil}"],
        "transformations": {evil: {evil: [evil]}, "lora": [{"adapter": evil}]},
        "tensors": [{**t, "method": evil} for t in made[0]["tensors"]],
    }  # fmt: skip
    shown = checked(page(report))
    assert "img" not in shown.tags and shown.text.count("alert(1)") > 5


def test_a_report_with_hardly_anything(tmp_path: Path) -> None:
    report = convert(hf_folder.write(tmp_path, "bert-cls"), tmp_path / "out.gguf", Recipe("f32"))
    shown = checked(page(report.to_dict()))
    assert "Not measured" in shown.text and not re.search(r"\bnan\b|\binf\b|None", shown.text)
