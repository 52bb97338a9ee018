"""`edgelm list` and `edgelm rm` on caches of the test's own, filled by fetching, and on what must never be removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from package_index import MODEL, SOURCE, files_below, sha256, wheel
from server import Server
from test_huggingface import in_another_process
from tiny import tiny

from edgelm import cached, disk, gguf, hub, packages, packed, rooms
from edgelm.cli import main
from edgelm.errors import SourceError, UsageError

posix = pytest.mark.skipif(sys.platform == "win32", reason="links, and files that are open, are other things there")


def edgelm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def names() -> list[str]:
    return [model.name for model in cached.models()]


@pytest.fixture
def fetched(package: Server) -> Path:
    """The file that SOURCE means, in the cache."""
    return hub.resolve(SOURCE)


@pytest.fixture
def runnable(server: Server, tmp_path: Path) -> Path:
    """A model in the cache that can be packed."""
    content = tiny("llama-gqa", fmt="Q4_0", folder=tmp_path, intermediate_size=128).read_bytes()
    server.pages["/models/tiny.gguf"] = ("", content)
    return hub.resolve(f"{server.url}/models/tiny.gguf")


def outside(tmp_path: Path) -> Path:
    """A file of the user's own."""
    file = tmp_path / "home" / "m.gguf"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(MODEL)
    return file


def test_what_was_fetched_is_listed_by_the_names_that_run_takes(
    fetched: Path, package: Server, request: pytest.FixtureRequest
) -> None:
    package.pages["/models/w.gguf"] = ("", b"GGUF" * 1000)
    urls = [f"{package.url}/models/w.gguf", f"{package.url}/models/w.gguf?signature=1"]
    paths = {SOURCE: fetched, urls[0]: hub.resolve(urls[0])}
    signed = hub.resolve(urls[1])
    paths[str(signed)] = signed  # the signature is a secret, and not written down
    request.getfixturevalue("no_network")
    listed = {model.name: model.path for model in cached.models()}
    assert listed == paths
    for name, path in paths.items():
        assert hub.resolve(name, offline=True) == path
    sizes = {model.name: model.n_bytes for model in cached.models()}
    assert sizes == {name: path.stat().st_size for name, path in paths.items()}


def test_the_table_and_its_json(fetched: Path, no_network: None) -> None:
    head, row = edgelm("list").stdout.splitlines()
    assert head.split() == ["NAME", "SIZE", "PACKED", "FETCHED"]
    assert row.split()[:4] == [SOURCE, "500.0", "KiB", "-"] and len(row.split()) == 6
    assert edgelm("ls").stdout == edgelm("list").stdout and str(fetched) in edgelm("list", "--paths").stdout
    (model,) = json.loads(edgelm("list", "--json").stdout)["models"]
    when = model.pop("fetched")
    assert model == {
        "name": SOURCE, "path": str(fetched), "n_bytes": len(MODEL), "packed_bytes": 0, "is_ours": True,
        "removed_by": f"edgelm rm {SOURCE}",
    }  # fmt: skip
    assert len(when) == len("2026-11-29T07:15:21Z") and when.endswith("Z")


def test_an_empty_cache_says_how_to_get_a_model(cache: Path, no_network: None) -> None:
    result = edgelm("list")
    assert result.exit_code == 0 and result.stdout == ""
    assert "`edgelm pull` fetches SmolLM2" in result.stderr and "pull --list" in result.stderr
    assert json.loads(edgelm("list", "--json").stdout)["models"] == []
    assert not cache.exists(), "looking makes nothing"


def test_a_known_model_has_its_short_name(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_package("some-model", ("some_model-1.0-py3-none-any.whl", wheel(some_model__m_gguf=MODEL)))
    known = hub.Known(f"{SOURCE}#sha256={sha256(MODEL)}", len(MODEL), "A model", "none")
    monkeypatch.setitem(hub.KNOWN, "short", known)
    path = hub.resolve("short")
    assert names() == ["short"]
    assert path in cached.remove(["short"])[0] and names() == []


@pytest.mark.parametrize("written", ["{source}", "{source}#sha256={pin}", "{path}"])
def test_a_model_is_removed_with_all_that_belongs_to_it(written: str, fetched: Path, cache: Path) -> None:
    for name in ("m.gguf.packed", "m.gguf.part", "m.gguf.joined", ".m.gguf.json.1-2.part", "x-1.0-any.whl.part"):
        fetched.with_name(name).write_bytes(b"12345")
    there = {cache / name for name in files_below(cache)}
    n_bytes = sum(path.stat().st_size for path in there)
    result = edgelm("rm", written.format(source=SOURCE, pin=sha256(MODEL), path=fetched))
    assert result.exit_code == 0, result.output
    assert set(result.stdout.splitlines()) == {str(path) for path in there - {fetched.with_name(".lock")}}
    assert f"{n_bytes / 1024:.1f} KiB are free again" in result.stderr
    assert files_below(cache) == {str(fetched.with_name(".lock").relative_to(cache))} and names() == []
    assert hub.resolve(SOURCE).read_bytes() == MODEL, "it can be fetched again"


def test_packed_weights_go_with_their_model_and_with_no_other(runnable: Path, cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "other" / "tiny.gguf"  # of the same name
    own.parent.mkdir()
    data = bytearray(runnable.read_bytes())
    data[len(data) // 2 :: 50] = bytes(b ^ 1 for b in data[len(data) // 2 :: 50])
    own.write_bytes(data)
    beside, in_cache, of_other = (
        file.write(path)
        for model in (runnable, own)
        for file in [packed.PackedFile.of(gguf.read(model))]
        for path in ([file.beside, file.cached] if model == runnable else [file.cached])
    )
    (model,) = cached.models()
    assert model.packed_bytes == beside.stat().st_size and "KiB" in edgelm("list").stdout.splitlines()[1]
    path, n_bytes = cached.beside()["packed weights"]
    assert (path, n_bytes) == (of_other.parent, in_cache.stat().st_size + of_other.stat().st_size)
    removed, others = cached.remove([model.name])
    assert {runnable, beside, in_cache} <= set(removed) and others == []
    assert of_other.exists() and own.exists() and names() == []


@pytest.mark.parametrize("source", [SOURCE, "{url}/m.gguf"])
def test_what_an_interrupted_fetch_has_left_is_listed_and_removed(source: str, package: Server, cache: Path) -> None:
    package.pages["/m.gguf"] = ("", MODEL)
    source = source.format(url=package.url)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("download") and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve(source, progress=interrupt)
    (model,) = cached.models()
    assert model.name == source and model.n_bytes >= len(MODEL) and model.fetched is None
    assert "incomplete" in edgelm("list").stdout and json.loads(edgelm("list", "--json").stdout)["models"][0]["path"]
    removed, others = cached.remove([source])
    assert sum(removed.values()) > model.n_bytes and others == [] and names() == []
    assert {Path(name).name for name in files_below(cache)} == {".lock"}


def test_a_fetch_that_has_brought_nothing_is_not_listed(server: Server) -> None:
    with pytest.raises(SourceError, match="404"):
        hub.resolve(f"{server.url}/nothing.gguf")
    assert names() == []


def test_a_file_whose_record_was_not_finished_is_incomplete(fetched: Path) -> None:
    rooms.record_of(fetched).write_text(json.dumps({"source": SOURCE}))
    assert [(m.name, m.n_bytes, m.fetched) for m in cached.models()] == [(SOURCE, len(MODEL), None)]
    assert hub.resolve(SOURCE) == fetched and cached.models()[0].fetched is not None


def test_files_of_others_in_a_folder_of_the_cache_stay(fetched: Path, cache: Path) -> None:
    """`edgelm quantize` writes beside its input, and its conversions can be resumed."""
    others = [
        fetched.with_name(name) for name in ("ggml-model-q4_0.gguf", "other.gguf.part", "q.report.json", "m.gguf.txt")
    ]
    for path in others:
        path.write_text('{"source": "pypi:x==1/other.gguf"}')
    result = edgelm("rm", SOURCE)
    assert result.exit_code == 0 and all(path.exists() for path in others)
    assert all(f"{path} stays" in result.stderr for path in others)
    assert names() == []


@pytest.mark.parametrize(
    "name",
    ["", "/", ".", "..", "../..", "~", "models", "{cache}", "{cache}/models", "{cache}/models/pypi", "{room}",
     "{file}/", "{room}/../{room_name}/m.gguf", "{file}.json", "{own}", "./m.gguf", "{file}\n", "*", "pypi", "pypi:*",
     "\0", "pypi:some-model==1.0/../../m.gguf", "hf:../../x", "http://[x", "file://{own}"],
)  # fmt: skip
def test_names_that_lead_elsewhere_remove_nothing(
    name: str, fetched: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = outside(tmp_path)
    monkeypatch.chdir(own.parent)
    before = files_below(tmp_path)
    places = {"cache": cache, "room": fetched.parent, "room_name": fetched.parent.name, "file": fetched, "own": own}
    with pytest.raises((SourceError, UsageError)):
        cached.remove([SOURCE, name.format(**places)])
    assert files_below(tmp_path) == before


def test_a_file_of_the_users_own_is_refused_and_near_names_are_told(fetched: Path, tmp_path: Path) -> None:
    own = outside(tmp_path)
    refused = edgelm("rm", own)
    assert refused.exit_code == 2 and refused.stdout == "" and "is no model that edgelm has fetched" in refused.stderr
    assert refused.stderr.count("\n") == 1 and own.exists()
    for name in ("some-model", "pypi:some-model", "pypi:some-model==1.1/some_model/m.gguf"):
        result = edgelm("rm", SOURCE, name)
        assert result.exit_code == 2 and f"did you mean {SOURCE}?" in result.stderr and fetched.exists()
    assert edgelm("rm", "smollm2").stderr == (
        "edgelm: no model smollm2 was fetched; `edgelm list` shows those that were\n"
    )


def link_file(file: Path, target: Path) -> None:
    shutil.move(file, target / file.name)
    file.symlink_to(target / file.name)


def link_packed(file: Path, target: Path) -> None:
    (target / "p").write_bytes(b"12")
    file.with_name(file.name + ".packed").symlink_to(target / "p")


def link_lock(file: Path, target: Path) -> None:
    file.with_name(".lock").unlink()
    file.with_name(".lock").symlink_to(target / "lock")


def link_room(file: Path, target: Path) -> None:
    shutil.move(file.parent, target / "room")
    file.parent.symlink_to(target / "room", target_is_directory=True)


def link_kind(file: Path, target: Path) -> None:
    shutil.move(file.parent.parent, target / "kind")
    file.parent.parent.symlink_to(target / "kind", target_is_directory=True)


def link_weights(file: Path, target: Path) -> None:
    (target / "m-0000.packed").write_bytes(b"12")
    packed.in_cache().symlink_to(target, target_is_directory=True)


def folder_for_wheel(file: Path, target: Path) -> None:
    file.with_name("x.whl").mkdir()


@posix
@pytest.mark.parametrize(
    "change", [link_file, link_packed, link_lock, link_room, link_kind, link_weights, folder_for_wheel]
)
def test_nothing_is_removed_behind_a_link(
    change: Callable[[Path, Path], None], fetched: Path, tmp_path: Path
) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    change(fetched, target)
    before = files_below(tmp_path)
    result = edgelm("rm", SOURCE)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "edgelm removes nothing there" in result.stderr or "no file of edgelm's" in result.stderr
    assert files_below(tmp_path) == before and hub.resolve(SOURCE, offline=True).read_bytes() == MODEL


@posix
def test_the_cache_itself_may_be_a_link(fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache", target_is_directory=True)
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "link"))
    cached.remove([SOURCE])
    assert not fetched.exists()


def test_a_record_that_others_wrote_is_no_model(fetched: Path, cache: Path) -> None:
    room = cache / "models" / "pypi" / "strange"
    room.mkdir()
    records: list[Any] = [
        [], {}, {"source": 5}, {"source": "x"}, {"source": "pypi:x"}, {"source": "smollm2/../m"}, {"source": "http://[x"},
        {"source": "https://host/m.gguf"}, {"source": "pypi:a==1/other.gguf"},
    ]  # fmt: skip
    for record in records:
        (room / "m.gguf.json").write_text(json.dumps(record))
        (room / "m.gguf.part").write_bytes(b"1")
        assert names() == [SOURCE], record
    (room / "m.gguf.json").write_bytes(b"[" * 100_000)
    assert names() == [SOURCE]


@posix
def test_a_table_stays_a_table_whatever_names_there_are(fetched: Path, cache: Path) -> None:
    room = cache / "models" / "web" / "two\nlines\x1b[2J"
    room.mkdir(parents=True)
    (room / "m.gguf").write_bytes(b"1")
    (room / "m.gguf.json").write_text('{"source": "https://host/m.gguf?x", "sha256": ""}')
    lines = edgelm("list").stdout.splitlines()
    assert len(lines) == 3 and "\\n" in lines[1] + lines[2] and "\x1b" not in lines[1] + lines[2]


def test_one_that_is_being_fetched_is_not_removed(fetched: Path) -> None:
    with disk.lock(fetched.with_name(".lock")):
        result = edgelm("rm", SOURCE)
    assert result.exit_code == 2 and "another process is at work" in result.stderr and fetched.exists()
    assert edgelm("rm", SOURCE).exit_code == 0


@posix
def test_one_that_another_process_has_mapped_can_go(fetched: Path) -> None:
    program = (
        "import mmap, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        "data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print(flush=True); input(); print(sum(data[:]))"
    )
    command = [sys.executable, "-c", program, str(fetched)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        cached.remove([SOURCE])
        assert process.communicate("\n")[0].strip() == str(sum(MODEL))


@posix
def test_bytes_that_another_name_keeps_are_not_counted_as_free(fetched: Path, tmp_path: Path) -> None:
    os.link(fetched, tmp_path / "kept.gguf")
    removed, _ = cached.remove([SOURCE])
    assert removed[fetched] == 0 and (tmp_path / "kept.gguf").read_bytes() == MODEL


def test_the_cache_of_the_hub_is_listed_and_left_alone(server: Server, tmp_path: Path) -> None:
    parts = {f"B/m-BF16-0000{i}-of-00002.gguf": MODEL[:i] for i in (1, 2)}
    server.repositories["org/repo"] = {
        "m-Q4_K_M.gguf": MODEL, "mmproj-m-f16.gguf": MODEL[:5], "config.json": b"{}", **parts,
    }  # fmt: skip
    program = """
        from pathlib import Path
        from click.testing import CliRunner
        from edgelm import cached, hub
        from edgelm.cli import main
        import huggingface_hub
        for file in ("config.json", "mmproj-m-f16.gguf"):
            huggingface_hub.hf_hub_download("org/repo", file)
        path = hub.resolve("hf:org/repo")
        split = hub.resolve("hf:org/repo:BF16")
        path.with_name(path.name + ".packed").write_bytes(b"123")
        models = {m.name: m for m in cached.models()}
        for name, model in models.items():
            assert hub.resolve(name, offline=True).samefile(model.path)
        said = {}
        for name in (*models, "hf:org/repo", "hf:org/repo:Q8_0", "hf:org/other", str(path)):
            done = CliRunner().invoke(main, ["rm", name])
            said[name] = [done.exit_code, done.stdout, done.stderr]
        split.unlink()
        result = [[m.to_dict() for m in models.values()], said, [m.name for m in cached.models()], str(path)]
    """
    models, said, later, path = in_another_process(server, tmp_path, program)
    sizes = {m["name"]: (m["n_bytes"], m["packed_bytes"]) for m in models}
    one, split = "hf:org/repo:m-Q4_K_M.gguf", f"hf:org/repo:{min(parts)}"
    assert sizes == {one: (len(MODEL), 3), split: (3, 0)}
    assert later == [one], "a split model that lacks a part cannot be run"
    assert all(code == 2 and not out and error.count("\n") == 1 for code, out, error in said.values())
    for name in (one, "hf:org/repo", path):
        assert "hf cache rm" in said[name][2] and f"edgelm pack --remove {one}" in said[name][2]
    assert "hf cache rm" in said[split][2] and "pack --remove" not in said[split][2]
    for name in ("hf:org/repo:Q8_0", "hf:org/other"):
        assert f"no model {name} was fetched" in said[name][2]
    assert Path(path).read_bytes() == MODEL


@posix
def test_revisions_of_the_hub(server: Server, tmp_path: Path) -> None:
    """Models of a branch, of a revision that no branch has any more, of a repository that `hf:` cannot name."""

    def put(repo: str, commit: str, file: str, blob: str, ref: str = "") -> None:
        folder = tmp_path / "hf" / "hub" / repo
        path = folder / "snapshots" / commit / file
        for new in (path, folder / "blobs" / blob, folder / "refs" / (ref or "none")):
            new.parent.mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / blob).write_text(blob)
        path.symlink_to(os.path.relpath(folder / "blobs" / blob, path.parent))
        if ref:
            (folder / "refs" / ref).write_text(commit)

    old, new, other = "1" * 40, "2" * 40, "3" * 40
    put("models--org--repo", old, "a.gguf", "A")
    put("models--org--repo", old, "same.gguf", "same")
    put("models--org--repo", new, "same.gguf", "same", "main")
    put("models--org--repo", other, "b.gguf", "B", "refs/pr/1")
    put("models--gpt2", new, "c.gguf", "C", "main")
    put("datasets--org--repo", new, "d.gguf", "D", "main")
    put("models--org--broken", new, "e.gguf", "E", "main")
    (tmp_path / "hf/hub/models--org--broken/blobs/E").unlink()
    program = """
        from edgelm import cached, hub
        result = {m.name: hub.resolve(m.name, offline=True).read_text() for m in cached.models()}
    """
    unnamed = str(tmp_path / "hf/hub/models--gpt2/snapshots" / new / "c.gguf")
    assert in_another_process(server, tmp_path, program) == {
        "hf:org/repo:same.gguf": "same", f"hf:org/repo@{old}:a.gguf": "A", "hf:org/repo@refs/pr/1:b.gguf": "B",
        unnamed: "C",
    }  # fmt: skip


def test_the_command_that_is_told_removes_a_model_of_the_hub(server: Server, tmp_path: Path) -> None:
    server.repositories["org/repo"] = {"m-Q4_K_M.gguf": MODEL}
    program = """
        import shlex, subprocess, sys
        from pathlib import Path
        from edgelm import cached, hub
        hub.resolve("hf:org/repo")
        (model,) = cached.models()
        hf, *arguments = shlex.split(model.removed_by)
        done = subprocess.run([Path(sys.executable).with_name(hf), *arguments, "--yes"], capture_output=True, text=True)
        result = [done.returncode, done.stderr, [m.name for m in cached.models()]]
    """
    if shutil.which("hf", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("the command hf is not installed")
    assert in_another_process(server, tmp_path, program)[::2] == [0, []]


def test_without_huggingface_hub_its_cache_is_not_looked_at(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert names() == [SOURCE]
    with pytest.raises(SourceError, match="no model hf:a/b was fetched"):
        cached.remove(["hf:a/b"])


def test_packages_and_compiled_kernels_are_counted(
    package: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(kernels))
    ours, others = kernels / "cpython-311-linux-x86_64-0123abcd-v1" / "zen", kernels / "of-others"
    for folder in (ours, others):
        folder.mkdir(parents=True)
        (folder / "x.o").write_bytes(b"1234")
    whole = packages.fetch_distribution("some-model", "1.0")
    found = cached.beside()
    assert found["compiled kernels"] == (kernels, 4)
    path, n_bytes = found["packages"]
    assert whole.is_relative_to(path) and n_bytes > whole.stat().st_size > len(MODEL)
    result = edgelm("list")
    assert f"edgelm: compiled kernels: 4 B in {kernels}\n" in result.stderr and "packages: " in result.stderr
    assert json.loads(edgelm("list", "--json").stdout)["compiled_kernels"] == {"path": str(kernels), "n_bytes": 4}
