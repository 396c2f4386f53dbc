#!/usr/bin/env python3
"""Write the reference values of every rope type: crates/rlhf-models/tests/goldens/rope.json.

Nothing needs it but a change of the cases. In a Python environment with torch and transformers 5:

    make_rope_goldens.py

For each case it puts the `config.json` fields of the case over those of a small model of tests/goldens/models, and
runs transformers: the frequencies and the factor of cosines and sines of a model whose heads are 64 wide, and some
logits of the small model after a sequence that is longer than the original context.
"""
import json
import platform
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests/goldens/models"
OUTPUT = ROOT / "crates/rlhf-models/tests/goldens/rope.json"
LENGTH = 48

CASES = {
    "linear": ("llama", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "linear_5": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50000.0}}),
    "linear_neox": ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 32, "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    ),
    "dynamic_within": (
        "llama",
        {"max_position_embeddings": 64, "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    ),
    "llama3": (
        "llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "yarn": (
        "qwen2",
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
    "yarn_all_fields": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 24,
                "attention_factor": 1.25,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "truncate": False,
            }
        },
    ),
    "yarn_mscale": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "mscale": 0.707,
                "mscale_all_dim": 1.2,
            },
        },
    ),
    "yarn_original_beside": (
        "llama",
        {
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


def run(name, model, fields):
    source = json.loads((MODELS / model / "config.json").read_text())
    for field in ("rope_parameters", "rope_scaling", "rope_theta"):
        source.pop(field, None)
    source |= fields
    # Configurations are changed while they are read.
    copy = lambda **more: json.loads(json.dumps(source | more))
    wide = copy(head_dim=64, hidden_size=256, num_attention_heads=4)
    config = AutoConfig.for_model(**wide)
    rope = AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb
    positions = torch.arange(LENGTH).unsqueeze(0)
    rope(torch.zeros(1), positions)
    loaded = AutoModelForCausalLM.from_pretrained(
        MODELS / model, config=AutoConfig.for_model(**copy()), dtype=torch.float32, local_files_only=True
    )
    ids = (torch.arange(LENGTH) * 37 + 11) % 700
    with torch.no_grad():
        logits = loaded(ids.unsqueeze(0)).logits[0]
    return {
        "name": name,
        "model": model,
        "fields": fields,
        "frequencies": rope.inv_freq.tolist(),
        "attention_factor": rope.attention_scaling,
        "input_ids": ids.tolist(),
        # The logits of some ids after half of the sequence and after all of it.
        "logits": logits[[LENGTH // 2 - 1, LENGTH - 1], :64].tolist(),
    }


def main():
    cases = [run(name, *case) for name, case in CASES.items()]
    peer = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": "scripts/make_rope_goldens.py",
    }
    text = {"peer": peer, "heads": 4, "head_dim": 64, "length": LENGTH, "cases": cases}
    OUTPUT.write_text(json.dumps(text) + "\n")


if __name__ == "__main__":
    main()
