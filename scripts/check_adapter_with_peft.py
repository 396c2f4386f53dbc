#!/usr/bin/env python3
"""Load an adapter written by `save_adapter` with PEFT and compare logits: a check of what PEFT makes of it.

Optional; nothing else here needs it. In a Python environment with torch, transformers 5 and peft:

    check_adapter_with_peft.py BASE_DIR ADAPTER_DIR LOGITS.safetensors [--tolerance 2e-4]

LOGITS holds `input_ids`, [B, T] without padding, and `logits`: [B, T, V] of a language model or [B, labels] of a
classifier; `cargo run --release -p rlhf-models --example adapter_for_peft -- BASE_DIR OUT_DIR` writes both. Fails if PEFT
finds a tensor missing or left over, or if a logit differs by more than the tolerance; the adapter must matter, too.
"""
import argparse
import sys
import warnings

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir")
    parser.add_argument("adapter_dir")
    parser.add_argument("logits")
    parser.add_argument("--tolerance", type=float, default=2e-4)
    options = parser.parse_args()

    warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it does not find
    expected = load_file(options.logits)
    classifier = PeftConfig.from_pretrained(options.adapter_dir).task_type == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    base = kind.from_pretrained(options.base_dir, local_files_only=True, dtype=torch.float32).eval()
    ids = expected["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = base(input_ids=ids, attention_mask=mask).logits.clone()
        model = PeftModel.from_pretrained(base, options.adapter_dir).eval()
        adapted = model(input_ids=ids, attention_mask=mask).logits
        merged = model.merge_and_unload()(input_ids=ids, attention_mask=mask).logits
    change = (adapted - plain).abs().max().item()
    error = (adapted - expected["logits"]).abs().max().item()
    merged_error = (merged - expected["logits"]).abs().max().item()
    print(f"{options.adapter_dir}: the adapter changes logits by {change:.3g}, PEFT differs by {error:.3g}, merged {merged_error:.3g}")
    if not change > 10 * options.tolerance:
        sys.exit("the adapter does next to nothing: the comparison says nothing")
    if not max(error, merged_error) <= options.tolerance:
        sys.exit("the logits differ")


if __name__ == "__main__":
    main()
