#!/usr/bin/env python3
"""Load a saved model directory with transformers and show what it computes: a check of `save_pretrained`.

Optional; nothing else here needs it. In a Python environment with torch and transformers 5:

    check_with_transformers.py MODEL_DIR [--prompt TEXT] [--new-tokens N]
    check_with_transformers.py MODEL_DIR --same-as OTHER_DIR

Fails if transformers finds a weight missing, left over or of another shape, or if a logit is not finite. For a causal
language model it prints the likeliest next tokens and the greedy continuation, for a sequence classifier the scores.
With --same-as it fails unless both folders give the same logits, bit for bit, on token ids that need no tokenizer.
"""
import argparse
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def load(model_dir):
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    classifier = any("SequenceClassification" in name for name in config.architectures or [])
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model, report = kind.from_pretrained(
        model_dir, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: sorted(map(str, found)) for key, found in report.items() if found}
    if problems:
        sys.exit(f"the weights do not fit {type(model).__name__}: {problems}")
    return model.eval(), classifier


def compare(model, other):
    length = min(64, model.config.max_position_embeddings)
    ids = ((torch.arange(length) * 37 + 11) % (model.config.vocab_size - 16) + 8).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = model(ids).logits, other(ids).logits
    if type(model) is not type(other) or not torch.equal(ours, theirs):
        sys.exit(f"{type(model).__name__} and {type(other).__name__} differ by {(ours - theirs).abs().max()}")
    print(f"{type(model).__name__}: {ours.numel()} equal logits")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--prompt", default="A program that")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--same-as", metavar="OTHER_DIR")
    options = parser.parse_args()

    model, classifier = load(options.model_dir)
    if options.same_as:
        compare(model, load(options.same_as)[0])
        return
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    inputs = tokenizer(options.prompt, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
    if not torch.isfinite(logits).all():
        sys.exit("a logit is not finite")

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e6:.2f} million parameters")
    print(f"prompt {options.prompt!r}, token ids {inputs['input_ids'][0].tolist()}")
    if classifier:
        print("scores", [round(score, 5) for score in logits[0].tolist()])
        return
    best = logits[0, -1].topk(5)
    print("next:", "  ".join(f"{tokenizer.decode([i])!r} {v:.4f}" for v, i in zip(best.values.tolist(), best.indices.tolist())))
    print("logits[-1, :8]", [round(v, 5) for v in logits[0, -1, :8].tolist()])
    written = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
    print("greedy:", repr(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])))


if __name__ == "__main__":
    main()
