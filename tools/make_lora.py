"""Write tests/golden/lora.npz and lora.json: what peft computes with the adapters of tests/converters/lora_folder.py.

    python tools/make_lora.py          in an environment with torch, transformers, peft and NumPy

For each case the JSON holds adapter_config.json as peft writes it, and the names and shapes of the tensors that it
saves; the archive holds the tokens of a text and the logits at some positions. Adapters run beside the model, as they
were trained, and are not merged by peft: where embedding and output are one matrix, peft's own merging changes both.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "converters"), str(ROOT / "tools")]

import lora_folder  # noqa: E402
import tiny  # noqa: E402
from make_golden import N_TOKENS  # noqa: E402

from edgelm.arch import Config  # noqa: E402

POSITIONS = np.array([1, 31, 39])


def base(name: str) -> Any:
    """The tiny model `name` in transformers, and its shape."""
    import torch
    import transformers

    hf = tiny.hf_config(name)
    config = Config.from_hf(hf)
    settings = {key: value for key, value in hf.items() if key not in ("architectures", "model_type")}
    hf_config = transformers.AutoConfig.for_model(hf["model_type"], **settings, attn_implementation="eager")
    hf_config.bos_token_id = hf_config.eos_token_id = None
    state = {spec.hf: torch.tensor(tiny.hf_array(spec, config)) for spec in tiny.hf_specs(name, config, hf)}
    model = getattr(transformers, hf["architectures"][0]).from_pretrained(
        None, config=hf_config, state_dict=state, dtype=torch.float32
    )
    return model.eval(), config


def adapted(case: lora_folder.Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(adapter_config.json and shapes, tokens and logits) of a case."""
    import peft
    import torch
    from safetensors.numpy import load_file

    model, config = base(case.variant)
    adapter = peft.get_peft_model(model, peft.LoraConfig(**case.settings, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder, save_embedding_layers=False)
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        shapes = {name: list(a.shape) for name, a in load_file(Path(folder) / "adapter_model.safetensors").items()}
        state = {name: torch.tensor(lora_folder.factor(name, tuple(shape))) for name, shape in shapes.items()}
    loaded = peft.set_peft_model_state_dict(adapter, state)
    if loaded.unexpected_keys:
        raise SystemExit(f"peft does not know its own tensors {loaded.unexpected_keys}")
    tokens = np.random.RandomState(7).randint(0, config.vocab_size, N_TOKENS)
    with torch.no_grad():
        logits = adapter.eval()(torch.tensor(tokens)[None]).logits[0].numpy()
    kept = {key: value for key, value in settings.items() if value not in (None, [], {}, False)}
    return {"config": kept, "shapes": shapes}, {"tokens": tokens.astype(np.int32), "logits": logits[POSITIONS]}


def main() -> None:
    facts, arrays = {}, {"positions": POSITIONS.astype(np.int32)}
    for name, case in lora_folder.CASES.items():
        facts[name], found = adapted(case)
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
        print(name, len(facts[name]["shapes"]), flush=True)
    folder = ROOT / "tests" / "golden"
    (folder / "lora.json").write_text(json.dumps(facts, indent=1) + "\n")
    np.savez_compressed(folder / "lora.npz", **arrays)


if __name__ == "__main__":
    main()
