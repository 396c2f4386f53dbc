#!/usr/bin/env python3
"""Conversations of two turns with a good and a bad last answer, for examples/dialogue_dpo.rs.

    make_dialogues.py FROM TO   FROM: examples/data/debtldr, TO: examples/data/dialogues

Deterministic. The sentences around the texts were written for this project; texts and summaries are those of FROM, the
train file's in train.jsonl and the valid file's in valid.jsonl, so that no package is in both. Rows are TRL's
conversational preferences: prompt, chosen and rejected are lists of messages.
"""
import json
import random
import sys
from pathlib import Path

TRAIN, VALID = 480, 96
ASK = ["What is this?", "Sum this up.", "In one line, please.", "Tell me what this is."]
ASK_AGAIN = ["And this?", "What about this one?", "Now this one.", "And this one, please."]
HELLO = ["I am looking for a program.", "Can you help me with a package?", "I have a question.", "Hello!"]
REPLY = ["Go on.", "Which one?", "What is it about?", "Hello."]
SHORTER = ["Shorter, please.", "Can you say that in fewer words?", "Too long.", "In short?"]
CHATTER = [
    "Sure! I would be happy to help you with that.",
    "Great question! Let me explain it for you.",
    "Thank you for asking, here is what I think.",
    "Of course! This is a really great choice.",
    "Wow, what an interesting text you have here!",
]
GOODBYE = [
    "I hope this helps you!",
    "Let me know if you have more questions!",
    "Please do not hesitate to ask me again.",
    "Have a nice day!",
]


def words(text, first, last):
    return " ".join(text.split()[first:last])


def said(*turns):
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": content} for role, content in zip(roles, turns)]


def answer(content):
    return [{"role": "assistant", "content": content}]


def second(rng, pair, other):
    """Two texts one after the other; the bad answer is still about the first."""
    prompt = said(
        f"{rng.choice(ASK)} {words(other['text'], 0, 8)}",
        other["summary"],
        f"{rng.choice(ASK_AGAIN)} {words(pair['text'], 0, 14)}",
    )
    return prompt, pair["summary"], other["summary"]


def plain(rng, pair, other):
    """A question in two messages; the bad answer is the good one wrapped in chatter."""
    del other
    prompt = said(rng.choice(HELLO), rng.choice(REPLY), f"{rng.choice(ASK)} {words(pair['text'], 0, 18)}")
    return prompt, pair["summary"], f"{rng.choice(CHATTER)} {pair['summary']}. {rng.choice(GOODBYE)}"


def shorter(rng, pair, other):
    """A long answer that is to become short; the bad one becomes longer."""
    del other
    prompt = said(f"{rng.choice(ASK)} {words(pair['text'], 0, 16)}", words(pair["text"], 0, 10), rng.choice(SHORTER))
    return prompt, pair["summary"], words(pair["text"], 0, 16)


def rows(pairs, count, seed):
    rng = random.Random(seed)
    pairs = rng.sample(pairs, count)
    kinds = [second, plain, shorter]
    for i, pair in enumerate(pairs):
        prompt, chosen, rejected = kinds[i % 3](rng, pair, pairs[(i + 1) % count])
        yield {
            "prompt": prompt,
            "chosen": answer(chosen),
            "rejected": answer(rejected),
        }


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    for name, count, seed in [("train", TRAIN, 0), ("valid", VALID, 1)]:
        pairs = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(pairs, count, seed)]
        (target / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
