"""A folder with an ONNX model, proven: which graph, what it takes and gives, and what the files beside it say about it.

The layouts are those of onnxruntime-genai (genai_config.json), of optimum and the Hugging Face hub (config.json; the
graph perhaps in a folder onnx/), and of `edgelm convert --format onnx`. What the graph itself says is believed; a
configuration that contradicts it is an error. Nothing here runs anything, and no onnxruntime is needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from . import onnx_file
from .arch import Config
from .errors import EdgelmError, FormatError, SourceError, UnsupportedError
from .onnx_file import OnnxFile, Tensor, Value, inside

MAX_JSON_BYTES = 1 << 27  # tokenizer.json of the largest vocabularies have 35 MB
# Where an exporter may have put the graph, the best first: with a cache, and whole.
NAMES = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "decoder_model.onnx")
HIDDEN = ("last_hidden_state", "token_embeddings", "hidden_states")  # outputs: a vector for each token
POOLED = ("sentence_embedding", "text_embeds", "pooler_output")  # outputs: a vector for each text
IDS, MASK, POSITIONS, TYPES = "input_ids", "attention_mask", "position_ids", "token_type_ids"
FROM = "outputs_from"  # an input of our own graphs: the first token whose logits are wanted
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
FLOATS = ("float32", "float16")
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # ends of the names of classes that predict the next token


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of a layer: the graph's input, its output, and the shape (1, heads, positions, dim)."""

    past: str
    present: str
    heads: int
    dim: int
    dtype: str


@dataclass(frozen=True)
class OnnxFolder:
    """What is in a folder.

    Attributes:
        path: the folder with configuration and tokenizer; graph: its ONNX file.
        genai, config, generation, tokenizer_config: the parsed genai_config.json (its "model"), config.json,
            generation_config.json and tokenizer_config.json; {} for those that are not there.
    """

    path: Path
    graph: OnnxFile
    genai: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def own(self) -> Config | None:
        """The hyperparameters that `edgelm convert` writes into the graph; None for graphs of others."""
        text = self.graph.metadata.get("edgelm.config")
        if text is None:
            return None
        try:
            return Config.from_gguf(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError, EdgelmError) as error:
            raise FormatError(f"{self.graph.path}: its metadata edgelm.config is damaged: {error!s:.200}") from None

    # ----------------------------------------------------------------------------------------------- what the graph is

    @cached_property
    def output(self) -> Value:
        """What is computed: logits (batch, tokens, vocabulary), hidden states (batch, tokens, dim), or a vector for
        each text (batch, dim)."""
        outputs = self.graph.outputs
        is_causal = self.cache or self.genai.get("decoder") or any(end in self._class for end in _CAUSAL)
        names = ("logits", *HIDDEN, *POOLED) if is_causal else (*HIDDEN, *POOLED)
        for name in names:
            if name in outputs:
                return self._proven(outputs[name], FLOATS, 2 if name in POOLED else 3)
        if "logits" in outputs:
            raise UnsupportedError(
                f"{self.graph.path}: it gives logits, but config.json says {self._class or 'nothing'}; text comes only "
                "from models for causal language modelling (…ForCausalLM)"
            )
        raise UnsupportedError(
            f"{self.graph.path}: it gives {_list(outputs)}; of a model for text that is logits, {' or '.join(HIDDEN)}, "
            f"{' or '.join(POOLED)}"
        )

    @property
    def is_encoder(self) -> bool:
        return self.output.name != "logits"

    @cached_property
    def cache(self) -> tuple[CacheTensor, ...]:
        """Keys and values that go in and out, in order of layers; empty for a graph that keeps nothing."""
        inputs, outputs, found = self.graph.inputs, self.graph.outputs, []
        for name, value in inputs.items():
            match = _PAST.fullmatch(name)
            if match is None:
                continue
            present = f"present.{match[1]}.{match[2]}"
            if present not in outputs:
                raise FormatError(f"{self.graph.path}: {name} goes in, but no {present} comes out")
            dims = self._proven(value, FLOATS, 4).dims or ()
            heads, dim = dims[1], dims[3] if isinstance(dims[3], int) else self._head_size
            if not isinstance(heads, int) or min(heads, dim) < 1:
                raise UnsupportedError(f"{self.graph.path}: {name} has the shape {dims}, not (batch, heads, past, dim)")
            if outputs[present].dtype != value.dtype:
                raise FormatError(f"{self.graph.path}: {name} and {present} are of different types")
            found.append(CacheTensor(name, present, heads, dim, value.dtype))
        unknown = [name for name in inputs if not _PAST.fullmatch(name) and name not in (IDS, MASK, POSITIONS, TYPES)]
        if unknown:
            raise UnsupportedError(f"{self.graph.path}: the inputs {_list(unknown)}, which edgelm does not know")
        return tuple(found)

    @property
    def _head_size(self) -> int:
        """The last dimension of keys and values, where the graph only names it, as genai's builder does."""
        decoder, config = self.genai.get("decoder"), self.config
        said = [decoder.get("head_size") if isinstance(decoder, dict) else None, config.get("head_dim")]
        found = next((_number(value, "head_size", "configuration") for value in said if value is not None), 0)
        dim, heads = (_number(config.get(key), key, "config.json") for key in ("hidden_size", "num_attention_heads"))
        return found or (dim // heads if heads else 0)

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """The constants of the graph, of those that are the same bytes only the first."""
        found: dict[object, Tensor] = {}
        for tensor in self.graph.tensors.values():
            found.setdefault(tensor.place if tensor.place[0] else tensor.name, tensor)
        return tuple(found.values())

    @cached_property
    def shares_buffers(self) -> bool:
        """Whether past and present may be one buffer that is longer than the text, as GroupQueryAttention has it."""
        users: dict[str, list[tuple[str, int]]] = {}
        makers = {name: node for node in self.graph.nodes for name in node.outputs}
        for node in self.graph.nodes:
            for at, name in enumerate(node.inputs):
                users.setdefault(name, []).append((node.op, at))
        for tensor in self.cache:
            maker = makers.get(tensor.present)
            if users.get(tensor.past) not in ([("GroupQueryAttention", 3)], [("GroupQueryAttention", 4)]):
                return False
            if maker is None or tensor.past not in maker.inputs:
                return False
        return bool(self.cache)

    @cached_property
    def max_position(self) -> int:
        """Positions that the graph has tables of, such as cosines; 0 if it has none."""
        rows = []
        for node in self.graph.nodes:
            tables = {"GroupQueryAttention": 7, "RotaryEmbedding": 2 if node.domain == "com.microsoft" else 1}
            at = tables.get(node.op, len(node.inputs))
            if at < len(node.inputs) and (table := self.graph.tensors.get(node.inputs[at])) is not None and table.dims:
                rows.append(table.dims[0])
        return min(rows, default=0)

    @cached_property
    def vocab_size(self) -> int:
        """Tokens that are predicted; of an encoder, tokens that it knows."""
        said = [
            _number(each.get("vocab_size"), "vocab_size", where)
            for where, each in (("genai_config.json", self.genai), ("config.json", self.config))
        ]
        size = said[0] or said[1] or (self.own.vocab_size if self.own else 0)
        graph = self._last_dim if not self.is_encoder else self._table[0]
        for where, size in zip(("genai_config.json", "config.json"), said, strict=True):
            if size and graph and size != graph:
                raise FormatError(f"{self.path / where}: a vocabulary of {size}, but the graph has {graph}")
        if not (size := graph or size):
            raise FormatError(f"{self.path}: neither the graph nor a config.json says how large the vocabulary is")
        return size

    @property
    def dim(self) -> int:
        """Length of hidden states; 0 if nothing says so."""
        known = self._last_dim if self.is_encoder else self._table[1]
        return known or _number(self.config.get("hidden_size"), "hidden_size", "config.json")

    @property
    def _last_dim(self) -> int:
        last = (self.output.dims or ("",))[-1]
        return last if isinstance(last, int) and last > 0 else 0

    @cached_property
    def _table(self) -> tuple[int, int]:
        """Shape of the table that token ids index; (0, 0) if that is not plain to see."""
        for node in self.graph.nodes:
            if node.op in ("Gather", "GatherBlockQuantized") and node.inputs[1:2] == (IDS,):
                tensor = self.graph.tensors.get(node.inputs[0])
                if tensor is not None and len(tensor.dims) == 2:
                    return tensor.dims[0], tensor.dims[1] if node.op == "Gather" else 0
        return 0, 0

    def _proven(self, value: Value, dtypes: tuple[str, ...], rank: int) -> Value:
        if value.dtype not in dtypes:
            raise UnsupportedError(f"{self.graph.path}: {value.name} is {value.dtype or 'untyped'}, no {_list(dtypes)}")
        if value.dims is None or len(value.dims) != rank:
            raise UnsupportedError(f"{self.graph.path}: {value.name} has the shape {value.dims}, not {rank} dimensions")
        return value

    # ------------------------------------------------------------------------------------- what is said about the model

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def architecture(self) -> str:
        kind = self.own.arch if self.own else self.genai.get("type") or self.config.get("model_type")
        return kind if isinstance(kind, str) else "onnx"

    @property
    def _class(self) -> str:
        classes = self.config.get("architectures")
        return ", ".join(map(str, classes)) if isinstance(classes, list) else ""

    @cached_property
    def context_length(self) -> int:
        """Tokens that the model was made for; 0 if nothing says so."""
        said = [_number(self.genai.get("context_length"), "context_length", "genai_config.json")]
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"):
                said.append(_number(config.get(key), key, "config.json"))
        said += [self.max_position, self.own.context_length if self.own else 0]
        longest = min((n for n in said if n), default=0)
        if self.architecture in ("roberta", "xlm-roberta", "camembert"):  # their positions begin behind the padding's
            longest -= _number(self.config.get("pad_token_id"), "pad_token_id", "config.json") + 1
        return max(longest, 0)

    @cached_property
    def pooling(self) -> str:
        """How the vectors of tokens become that of a text; see `Model.pooling`."""
        if self.output.name in POOLED:
            return "graph"
        if self.own is not None:
            return self.own.pooling
        modes = read_object(self.path, "1_Pooling/config.json") or {}
        for key, pooling in (("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")):
            if modes.get(f"pooling_mode_{key}") is True:
                return pooling
        return "none"

    def prove(self) -> None:
        """Raises FormatError or UnsupportedError where graph and configuration cannot be what they say."""
        inputs = self.graph.inputs
        if IDS not in inputs:
            raise UnsupportedError(f"{self.graph.path}: no {IDS} go in, but {_list(inputs)}; it is no model for text")
        for name in (IDS, MASK, POSITIONS, TYPES):
            if name in inputs:
                self._proven(inputs[name], ("int64", "int32"), 2)
        self._prove_genai()
        if any(node.ints.get("sliding_window_cache") for node in self.graph.nodes):
            raise UnsupportedError(
                f"{self.graph.path}: keys and values of layers with a window go round in a cache of its size "
                "(sliding_window_cache), from which no text can be taken back; export the model without that"
            )
        if 0 < self._table[0] < self.vocab_size:
            raise FormatError(
                f"{self.graph.path}: a table of {self._table[0]} tokens, but {self.vocab_size} are predicted"
            )
        _ = self.output, self.cache, self.vocab_size, self.context_length

    def _prove_genai(self) -> None:
        decoder = self.genai.get("decoder", {})
        if not isinstance(decoder, dict):
            raise FormatError(f"{self.path / 'genai_config.json'}: its decoder is no object")
        first = self.cache[0] if self.cache else None
        facts = {
            "num_hidden_layers": len(self.cache) // 2,
            "num_key_value_heads": first.heads if first else 0,
            "head_size": first.dim if first else 0,
        }
        for key, graph in facts.items():
            said = _number(decoder.get(key), key, "genai_config.json")
            if said and graph and said != graph:
                raise FormatError(f"{self.path / 'genai_config.json'}: {key} is {said}, but the graph has {graph}")


def find(path: Path) -> Path | None:
    """The ONNX file that a path means: itself, or the one in a folder; None if there is none."""
    if path.is_file():
        return path if path.suffix.lower() == ".onnx" else None
    for folder in (path, path / "onnx"):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
        if len(files := sorted(folder.glob("*.onnx"))) == 1:
            return files[0]
    return None


def read(path: Path) -> OnnxFolder:
    """Reads a folder with an ONNX model, or the folder of an ONNX file.

    Raises:
        SourceError: there is no such file, or it cannot be opened.
        FormatError: something in it is broken, lies, or points out of the folder.
        UnsupportedError: its graph is fine, but no model that edgelm knows how to run.
    """
    home = path if path.is_dir() else path.parent
    if home.name == "onnx" and not (home / "config.json").exists() and (home.parent / "config.json").exists():
        home = home.parent
    genai = (read_object(home, "genai_config.json") or {}).get("model", {})
    if not isinstance(genai, dict):
        raise FormatError(f"{home / 'genai_config.json'}: its model is no object")
    graph = find(path)
    decoder = genai.get("decoder")
    if path.is_dir() and isinstance(decoder, dict) and isinstance(name := decoder.get("filename"), str):
        graph = inside(home, name, f"the graph of {home / 'genai_config.json'}")
        if not graph.exists():
            raise SourceError(f"{graph} is not there, but {home / 'genai_config.json'} names it")
    if graph is None:
        raise SourceError(f"{path}: no ONNX model in it")
    inside(home, graph.relative_to(home).as_posix(), "the graph")
    folder = OnnxFolder(
        home,
        onnx_file.read(graph),
        genai,
        read_object(home, "config.json") or {},
        read_object(home, "generation_config.json") or {},
        read_object(home, "tokenizer_config.json") or {},
    )
    folder.prove()
    return folder


def read_text(folder: Path, name: str, most: int = MAX_JSON_BYTES) -> str | None:
    """The text of a file of the folder, None if it is not there."""
    path = inside(folder, name, name)
    try:
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise FormatError(f"{path} has {size} bytes; at most {most} make sense")
            return file.read(most).decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not valid UTF-8") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of the folder, None if there is no such file."""
    text = read_text(folder, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise FormatError(f"{folder / name} is not valid JSON: {reason:.200}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{folder / name} holds no JSON object")
    return value


def _number(value: Any, key: str, where: str) -> int:
    """A count that a configuration gives; 0 if it gives none."""
    if value is None:
        return 0
    if type(value) is not int or not 0 < value < 1 << 31:
        raise FormatError(f"{where}: {key} is {value!r:.40}, which cannot be")
    return value


def _list(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "nothing"
