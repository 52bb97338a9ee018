"""Folders with tiny ONNX models, written by hand with `onnx.helper` as others' exporters write them.

    path = folder(tmp_path, "genai")           # as onnxruntime-genai's builder: GroupQueryAttention, genai_config.json
    path = folder(tmp_path, "optimum")         # plain operators, past and present joined by Concat
    path = folder(tmp_path, "bare")            # the same without a cache
    path = encoder(tmp_path)                   # a table and a mean: last_hidden_state, sentence_embedding

They are the tiny llama of `tests/tiny.py` with the same random weights, so that the reference interpreter, running that
GGUF file, says what they must compute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import onnx
import tiny
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

VARIANT = "llama-gqa"
F32, I64, I32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


class Graph:
    """Nodes and constants while they are collected."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def __call__(self, op: str, *inputs: str, out: str | tuple[str, ...] = "", **attributes: Any) -> str:
        outputs = out if isinstance(out, tuple) else (out or f"v{len(self.nodes)}",)
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def model(self, opset: int = 17) -> Any:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def info(name: str, kind: int, *dims: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, dims)


def folder(root: Path, style: str = "genai", *, external: bool = False, **overrides: Any) -> Path:
    """The folder of the tiny llama in a style; with its weights in a file beside the graph, if external."""
    hf = tiny.hf_config(VARIANT, **overrides)
    path = root / f"{style}-{'external' if external else 'whole'}"
    path.mkdir(parents=True)
    model = llama(style, hf, hf_folder.state(VARIANT, hf))
    onnx.save_model(
        model, str(path / "model.onnx"), save_as_external_data=external, location="model.onnx.data", size_threshold=256
    )
    (path / "config.json").write_text(json.dumps(hf))
    hf_folder.tokenizer(path, *tiny.VARIANTS[VARIANT].vocabulary, hf["vocab_size"])
    if style == "genai":
        decoder = {
            "filename": "model.onnx", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_size": 16,
            "num_attention_heads": 4, "hidden_size": 64,
        }  # fmt: skip
        config = {"type": "llama", "vocab_size": 512, "context_length": 128, "eos_token_id": [1, 3], "decoder": decoder}
        (path / "genai_config.json").write_text(json.dumps({"model": config}))
    return path


def llama(style: str, hf: dict[str, Any], w: dict[str, NDArray[np.float32]]) -> Any:
    """The graph: token ids to logits."""
    g, has_cache = Graph(), style != "bare"
    heads, kv_heads, dim = hf["num_attention_heads"], hf["num_key_value_heads"], hf["hidden_size"]
    size = dim // heads
    g.inputs = [info("input_ids", I64, "batch", "tokens"), info("attention_mask", I64, "batch", "total")]
    if style == "optimum":
        g.inputs.append(info("position_ids", I64, "batch", "tokens"))
    angles = np.outer(np.arange(hf["max_position_embeddings"]), hf["rope_theta"] ** (-np.arange(0, size, 2) / size))
    cos, sin = g.constant(np.cos(angles), name="cos"), g.constant(np.sin(angles), name="sin")

    def norm(x: str, weight: str) -> str:
        mean = g("ReduceMean", g("Mul", x, x), axes=[-1])
        root = g("Sqrt", g("Add", mean, g.constant(hf["rms_norm_eps"])))
        return g("Mul", g("Div", x, root), g.constant(w[weight]))

    def linear(x: str, weight: str) -> str:
        return g("MatMul", x, g.constant(w[weight].T.copy()))

    total = g("Shape", "attention_mask", start=1, end=2)
    x = g("Gather", g.constant(w["model.embed_tokens.weight"]), "input_ids")
    if style == "genai":
        keys = g("ReduceSum", "attention_mask", g.constant([1], np.int64), keepdims=0)
        lengths = g("Cast", g("Sub", keys, g.constant(1, np.int64)), to=I32)
        longest = g("Squeeze", g("Cast", total, to=I32))
    else:
        n_tokens = g("Shape", "input_ids", start=1, end=2)
        if style == "optimum":
            positions = "position_ids"
        else:
            scalars = (g.constant(0, np.int64), g("Squeeze", n_tokens), g.constant(1, np.int64))
            positions = g("Unsqueeze", g("Range", *scalars), g.constant([0], np.int64))
        rotation = [g("Unsqueeze", g("Gather", table, positions), g.constant([1], np.int64)) for table in (cos, sin)]
        keys = g("Range", g.constant(0, np.int64), g("Squeeze", total), g.constant(1, np.int64))
        visible = g("LessOrEqual", keys, g("Unsqueeze", positions, g.constant([2], np.int64)))
        mask = g("Unsqueeze", g("Where", visible, g.constant(0.0), g.constant(-1e9)), g.constant([1], np.int64))

    def rotated(x: str, n: int) -> str:
        """(batch, tokens, n * size) as heads, the halves of each turned against each other."""
        x = g("Transpose", g("Reshape", x, g.constant([0, 0, n, size], np.int64)), perm=[0, 2, 1, 3])
        g("Split", x, out=(f"{x}a", f"{x}b"), axis=3)
        c, s = rotation
        first = g("Sub", g("Mul", f"{x}a", c), g("Mul", f"{x}b", s))
        return g("Concat", first, g("Add", g("Mul", f"{x}b", c), g("Mul", f"{x}a", s)), axis=3)

    def attention(i: int, q: str, k: str, v: str) -> str:
        past = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
        present = [f"present.{i}.{kind}" for kind in ("key", "value")]
        if has_cache:
            g.inputs += [info(name, F32, "batch", kv_heads, "past", size) for name in past]
            g.outputs += [info(name, F32, "batch", kv_heads, "total", size) for name in present]
        if style == "genai":
            out = (f"attention{i}", *present)
            return g(
                "GroupQueryAttention", q, k, v, *past, lengths, longest, cos, sin, out=out, domain="com.microsoft",
                num_heads=heads, kv_num_heads=kv_heads, do_rotary=1,
            )  # fmt: skip
        q, k = rotated(q, heads), rotated(k, kv_heads)
        v = g("Transpose", g("Reshape", v, g.constant([0, 0, kv_heads, size], np.int64)), perm=[0, 2, 1, 3])
        if has_cache:
            k, v = (g("Concat", p, x, out=o, axis=2) for p, x, o in zip(past, (k, v), present, strict=True))
        # Query heads in groups, one for each key head: (batch, kv_heads, group, tokens, size).
        q = g("Reshape", q, g.constant([0, kv_heads, heads // kv_heads, -1, size], np.int64))
        k, v = (g("Unsqueeze", x, g.constant([2], np.int64)) for x in (k, v))
        scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 2, 4, 3])), g.constant(size**-0.5))
        scores = g("Add", scores, g("Unsqueeze", mask, g.constant([1], np.int64)))
        y = g("MatMul", g("Softmax", scores, axis=-1), v)
        y = g("Reshape", y, g.constant([0, heads, -1, size], np.int64))
        return g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), g.constant([0, 0, heads * size], np.int64))

    for i in range(hf["num_hidden_layers"]):
        block = f"model.layers.{i}."
        h = norm(x, block + "input_layernorm.weight")
        q, k, v = (linear(h, f"{block}self_attn.{letter}_proj.weight") for letter in "qkv")
        x = g("Add", x, linear(attention(i, q, k, v), block + "self_attn.o_proj.weight"))
        h = norm(x, block + "post_attention_layernorm.weight")
        gate = linear(h, block + "mlp.gate_proj.weight")
        up = g("Mul", g("Mul", gate, g("Sigmoid", gate)), linear(h, block + "mlp.up_proj.weight"))
        x = g("Add", x, linear(up, block + "mlp.down_proj.weight"))
    x = norm(x, "model.norm.weight")
    g("MatMul", x, g.constant(w["lm_head.weight"].T.copy()), out="logits")
    g.outputs.insert(0, info("logits", F32, "batch", "tokens", hf["vocab_size"]))
    return g.model()


def encoder(root: Path, outputs: tuple[str, ...] = ("last_hidden_state",), **settings: Any) -> Path:
    """A folder with an "encoder" whose vector of a token is a row of its table, and of a text their mean."""
    path = root / "-".join(outputs)
    path.mkdir(parents=True)
    hf = tiny.hf_config("bert-mean")
    hf.pop("pooling_type", None)
    onnx.save_model(look_up(words(), outputs), str(path / "model.onnx"))
    (path / "config.json").write_text(json.dumps(hf))
    hf_folder.tokenizer(path, *tiny.VARIANTS["bert-mean"].vocabulary, hf["vocab_size"])
    return path


def look_up(table: NDArray[np.float32], outputs: tuple[str, ...] = ("last_hidden_state",)) -> Any:
    """The graph of such an encoder."""
    g, dim = Graph(), table.shape[1]
    g.inputs = [info(name, I64, "batch", "tokens") for name in ("input_ids", "attention_mask", "token_type_ids")]
    g("Gather", g.constant(table, name="words"), "input_ids", out="last_hidden_state")
    g("ReduceMean", "last_hidden_state", out="sentence_embedding", axes=[1], keepdims=0)
    shapes = {"last_hidden_state": ("batch", "tokens", dim), "sentence_embedding": ("batch", dim)}
    g.outputs = [info(name, F32, *shapes[name]) for name in outputs]
    return g.model()


def words() -> NDArray[np.float32]:
    """The table of the encoder."""
    hf = tiny.hf_config("bert-mean")
    hf.pop("pooling_type", None)
    return hf_folder.state("bert-mean", hf)["embeddings.word_embeddings.weight"]
