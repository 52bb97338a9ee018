"""GGUF files in repositories of Hugging Face, through the package huggingface_hub (extra "hub").

That package does the transfer, the resuming, the locks and the cache, which other programs share; HF_ENDPOINT, HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE mean what they mean there. It is imported when the first `hf:` source is asked for.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .disk import Progress, file_sha256
from .errors import EdgelmError, SourceError, UsageError

DEFAULT_QUANT = "Q4_K_M"  # when none is named, as for llama.cpp's -hf


def parse(text: str) -> tuple[str, str | None, str]:
    """`[//]org/repo[@revision][:file-or-quant]` or `//org/repo/path/of/file.gguf`: (repository, revision, selector)."""
    fields = re.fullmatch(r"(?://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?:[:/](.+))?", text)
    if not fields:
        raise UsageError(f"hf:{text} is not of the form hf:org/repo[@revision][:file-or-quantization]")
    return fields[1], fields[2], fields[3] or ""


def select(files: list[str], selector: str, where: str) -> list[str]:
    """The files to fetch from a repository: one, or all parts of a split one in order.

    A selector is a path or glob of a .gguf file, or the name of a quantization as it stands in file names ("Q8_0").

    Raises:
        SourceError: nothing fits, or several models do; the message lists what there is.
    """
    models = sorted(filter(_is_model, files))
    if selector.lower().endswith(".gguf"):
        fitting = [f for f in files if f == selector] or [f for f in models if fnmatch.fnmatchcase(f, selector)]
    else:
        quant = re.escape(selector or DEFAULT_QUANT)
        fitting = [f for f in models if re.search(rf"(?i)(^|[-._/]){quant}(?=[-./])", f)]
    groups = _models(fitting)
    if len(groups) == 1:
        name = groups[0][0]
        if split := re.search(r"^(.*)-\d{5}-of-(\d{5})\.gguf$", name):
            count = int(split[2])
            parts = [f"{split[1]}-{i:05}-of-{split[2]}.gguf" for i in range(1, min(count, len(files)) + 1)]
            if missing := sorted(set(parts) - set(files)) or count > len(files):
                raise SourceError(f"{where} lacks parts of a split model: {missing}")
            return parts
        return [name]
    there = ", ".join((fitting or models)[:12]) or "no GGUF file at all"
    wanted = selector or f"{DEFAULT_QUANT} (the default)"
    raise SourceError(
        f"{where}: {len(groups) or 'no'} models fit {wanted}; choose with hf:org/repo:FILE. There is: {there}"
    )


def _is_model(name: str) -> bool:
    is_other = re.search(r"(?i)(^|[-._/])(mmproj|imatrix)", PurePosixPath(name).name)
    return name.lower().endswith(".gguf") and not is_other


def _models(names: list[str]) -> list[list[str]]:
    """GGUF files by the models that they are parts of."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-of-\1.gguf", name), []).append(name)
    return list(groups.values())


def fetch(text: str, offline: bool, progress: Progress) -> Path:
    """The file that `text` (see `parse`) names, in the cache of huggingface_hub; of a split model, its first part.

    Raises:
        SourceError: no huggingface_hub, no such repository or file, no access, no network and nothing in the cache.
    """
    selector = parse(text)[2]
    return _fetch(text, lambda files, where: select(files, selector, where), offline, progress)[0]


def fetch_folder(
    text: str, weights: Sequence[Sequence[str]], rest: Sequence[str], offline: bool, progress: Progress
) -> Path:
    """The folder of a repository's checkpoint: the files that fit the first of `weights` that any fits, and `rest`.

    `weights` and `rest` are patterns of paths. Raises as `fetch` does.
    """

    def fitting(files: list[str], patterns: Sequence[str]) -> list[str]:
        pairs = [(f, p) for f in files for p in patterns if f.count("/") == p.count("/")]
        return [f for f, p in pairs if fnmatch.fnmatchcase(f, p)]

    def choose(files: list[str], where: str) -> list[str]:
        found = next((found for patterns in weights if (found := fitting(files, patterns))), [])
        if "config.json" not in files or not found:
            raise SourceError(f"{where} holds no checkpoint: {', '.join(files[:12]) or 'it is empty'}")
        return ["config.json", *sorted({*found, *fitting(files, rest)} - {"config.json"})]

    return _fetch(text, choose, offline, progress)[0].parent


def _fetch(
    text: str, choose: Callable[[list[str], str], list[str]], offline: bool, progress: Progress
) -> list[Path]:
    """The files of a repository that `choose` picks, fetched."""
    repo, revision, _ = parse(text)
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise SourceError("hf: sources need the package huggingface_hub: pip install 'edgelm[hub]'") from error
    where = f"hf:{repo}" + (f"@{revision}" if revision else "")
    offline = offline or bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    try:
        files, offline = _files(huggingface_hub, repo, revision, offline)
        return [_one(huggingface_hub, repo, revision, name, offline, progress) for name in choose(files, where)]
    except EdgelmError:
        raise
    except Exception as error:  # whatever that package raises, and the HTTP client under it, is about this source
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if offline:
            reason = "it is not in the cache, and the network is switched off or out of reach"
        raise SourceError(f"{where}: {reason}") from error


def _files(hub: Any, repo: str, revision: str | None, offline: bool) -> tuple[list[str], bool]:
    """The files of a repository, and whether the hub is out of reach: then they are those in the cache."""
    problem: Exception | None = None
    if not offline:
        try:
            found = hub.HfApi().model_info(repo, revision=revision, timeout=20)
            return [sibling.rfilename for sibling in found.siblings or ()], False
        except hub.errors.HfHubHTTPError:
            raise  # the hub answered: it has no such thing, or will not give it
        except Exception as error:
            problem = error
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
        if problem is not None:
            raise problem from None  # tells more than that the cache is empty
        raise
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()], True


def cached() -> Iterator[tuple[str, list[Path], str]]:
    """GGUF models in the cache of huggingface_hub: what `hub.resolve` takes, the files, the command that removes them.

    A file that several revisions share is one model. Without that package, or such a cache, there are none.
    """
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors as errors
    except ImportError:
        return
    try:
        repos = sorted(hub.scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except (OSError, ValueError, errors.CacheNotFound):
        return
    by_file = hasattr(hub.HFCacheInfo, "delete_files")
    for repo in repos:
        for name, files, paths in _of_repo(repo) if repo.repo_type == "model" else ():
            targets = [f"hf://models/{repo.repo_id}/{f}" for f in files] if by_file else [f"model/{repo.repo_id}"]
            yield name, paths, shlex.join(["hf", "cache", "rm", *targets])


def _of_repo(repo: Any) -> Iterator[tuple[str, list[str], list[Path]]]:
    """The models of a repository in the cache: what `hub.resolve` takes, names and paths of the files."""
    seen = set()
    for revision in sorted(repo.revisions, key=lambda r: ("main" not in r.refs, not r.refs, r.commit_hash)):
        there = {file.file_path.relative_to(revision.snapshot_path).as_posix(): file for file in revision.files}
        at = None if "main" in revision.refs else min(revision.refs, default=revision.commit_hash)
        for first, *_ in _models(sorted(filter(_is_model, there))):
            with suppress(SourceError):  # parts are missing
                files = select(list(there), first, repo.repo_id)
                if (blob := there[files[0]].blob_path) not in seen:
                    seen.add(blob)
                    paths = [there[file].file_path for file in files]
                    yield _source(repo.repo_id, at, files[0]) or str(paths[0]), files, paths


def _source(repo: str, revision: str | None, file: str) -> str:
    """What `hub.resolve` takes for a file of a repository; nothing where that cannot be written."""
    text = repo + (f"@{revision}" if revision else "") + f":{file}"
    with suppress(UsageError):
        if parse(text) == (repo, revision, file):
            return f"hf:{text}"
    return ""


def _one(hub: Any, repo: str, revision: str | None, name: str, offline: bool, progress: Progress) -> Path:
    known = hub.try_to_load_from_cache(repo, name, revision=revision)
    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        options["tqdm_class"] = _bar(hub, f"download {PurePosixPath(name).name}", progress)
    path = Path(hub.hf_hub_download(repo, name, revision=revision, local_files_only=offline, **options))
    blob = path.resolve()
    is_new = not isinstance(known, str) or blob != Path(known).resolve()
    # A large file is stored under its sha256, which the package does not check after a plain HTTP transfer.
    named_by_hash = re.fullmatch(r"[0-9a-f]{64}", blob.name)
    if is_new and named_by_hash and file_sha256(blob, progress, f"verify {path.name}") != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise SourceError(f"hf:{repo} sent a {name} that is not the one with sha256 {blob.name}; try again")
    return path


def _bar(hub: Any, stage: str, progress: Progress) -> type[Any]:
    """A progress bar class that draws nothing and reports to `progress`."""

    class Bar(hub.utils.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.done, self.goal = int(options.get("initial") or 0), int(options.get("total") or 0)
            super().__init__(*args, **{**options, "disable": True})
            progress(stage, self.done, self.goal)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            progress(stage, self.done, self.goal)

    return Bar
