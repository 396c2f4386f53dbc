#!/usr/bin/env python3
"""The peer's side of benches/vs_peers: transformers and TRL on the token ids that ours gets.

It is started by the benchmark with the work as one JSON argument, reads `step` lines, and prints lines that begin with
`VS_PEERS `: when all is loaded, after every step (its seconds and what it read), and at the end of its input.
"""
import json
import os
import resource
import sys
import tempfile
import time

work = json.loads(sys.argv[1])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

torch.set_num_threads(work["threads"])
torch.manual_seed(0)
BATCH, STEPS = work["batch"], work["steps"]
with open(work["pairs"]) as lines:
    PAIRS = [json.loads(line) for line in lines]
# As many as the steps need, in the order that ours takes them.
ROWS = [PAIRS[i % len(PAIRS)] for i in range(BATCH * STEPS)]
TOKENIZER = AutoTokenizer.from_pretrained(work["model"])
if TOKENIZER.pad_token is None:
    TOKENIZER.pad_token = TOKENIZER.eos_token


def say(kind, **fields):
    print("VS_PEERS " + json.dumps({kind: fields}), flush=True)


def wait():
    """True for another step, false at the end of the input."""
    return sys.stdin.readline().strip() == "step"


def done():
    say("done", peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def read_of(ids, mask):
    """What a step read, as ours reports it."""
    mask = mask.bool()
    return {"tokens": int(mask.sum()), "id_sum": int(ids[mask].sum())}


def load(kind):
    return AutoModelForCausalLM.from_pretrained(work["model"], dtype=kind)


def forward_backward():
    """Both answers of every prompt in a right-padded batch, log-probabilities from all logits."""
    model = load(getattr(torch, work["dtype"]))
    batches = []
    for step in range(STEPS):
        rows = ROWS[step * BATCH : (step + 1) * BATCH]
        pairs = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)

        def padded(of, fill):
            return torch.tensor([(x := of(*pair)) + [fill] * (width - len(x)) for pair in pairs])

        batches.append(
            (
                padded(lambda prompt, answer: prompt + answer, TOKENIZER.pad_token_id),
                padded(lambda prompt, answer: [1] * len(prompt + answer), 0),
                padded(lambda prompt, answer: [0] * len(prompt) + [1] * len(answer), 0),
            )
        )
    say("ready", versions=f"transformers {transformers.__version__}, torch {torch.__version__}")
    for ids, mask, answers in batches:
        if not wait():
            return done()
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        chosen = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
        (-(chosen * answers[:, 1:]).sum()).backward()
        say("step", seconds=time.perf_counter() - start, **read_of(ids, mask))
    wait()
    done()


def generate(sampled=True):
    """48 tokens for every left-padded prompt, after one for the first."""
    model = load(getattr(torch, work["dtype"])).eval()
    batches = []
    for step in range(STEPS):
        prompts = [row["prompt"] for row in ROWS[step * BATCH : (step + 1) * BATCH]]
        width = max(map(len, prompts))
        ids = torch.tensor([[TOKENIZER.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        batches.append((ids, mask))

    @torch.no_grad()
    def write(ids, mask, tokens):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            **(dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sampled else dict(do_sample=False)),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=TOKENIZER.pad_token_id,
        )

    first = torch.tensor([ROWS[0]["prompt"]])
    write(first, torch.ones_like(first), 1)
    say("ready", versions=f"transformers {transformers.__version__}, torch {torch.__version__}")
    for ids, mask in batches:
        if not wait():
            return done()
        start = time.perf_counter()
        written = write(ids, mask, 48)[:, ids.shape[1] :]
        seconds = time.perf_counter() - start
        read = {**read_of(ids, mask), "tokens": written.numel()}
        if not sampled:
            read["id_sum"] = int((written * torch.arange(1, written.shape[1] + 1)).sum())
        say("step", seconds=seconds, **read)
    wait()
    done()


def greedy():
    """The likeliest tokens; a step reports them, every id times its place."""
    generate(sampled=False)


class Turns(TrainerCallback):
    """Waits before each of a trainer's steps and reports after it."""

    def __init__(self):
        self.read = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if not wait():
            done()
            os._exit(0)
        self.read = {}
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        say("step", seconds=time.perf_counter() - self.start, **self.read)

    def watch(self, trainer):
        """Notes the ids of every batch that the trainer trains on."""
        step = trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            self.read = read_of(inputs["input_ids"], inputs["attention_mask"])
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step


def train(make, rows):
    """Runs a TRL trainer on `rows`, which have the columns that it tokenises texts to, in their order."""
    import trl
    from datasets import Dataset

    turns = Turns()
    settings = dict(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        bf16=work["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        max_length=None,
    )
    trainer = make(trl, settings, turns)
    dataset = Dataset.from_list(rows)
    prepared = set(trainer.train_dataset.column_names)
    if not set(dataset.column_names) <= prepared:
        sys.exit(f"TRL prepares the columns {prepared}, not {dataset.column_names}: this script is for another version")
    trainer.train_dataset = dataset
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(dataset)
    turns.watch(trainer)
    say("ready", versions=f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    trainer.train()
    wait()
    done()


def texts(*columns):
    """A few texts for a trainer to prepare, before it gets the ids instead."""
    from datasets import Dataset

    return Dataset.from_list([{column: "a b c" for column in columns} for _ in range(2)])


def sft():
    def make(trl, settings, turns):
        return trl.SFTTrainer(
            model=load(torch.float32),
            args=trl.SFTConfig(**settings),
            train_dataset=texts("prompt", "completion"),
            processing_class=TOKENIZER,
            callbacks=[turns],
        )

    rows = [
        {
            "input_ids": row["prompt"] + row["chosen"],
            # Prompts carry no loss, TRL's default for prompts with completions.
            "labels": [-100] * len(row["prompt"]) + row["chosen"],
        }
        for row in ROWS
    ]
    train(make, rows)


def dpo(precomputed=False):
    def make(trl, settings, turns):
        return trl.DPOTrainer(
            model=load(torch.float32),
            args=trl.DPOConfig(**settings, precompute_ref_log_probs=precomputed),
            train_dataset=texts("prompt", "chosen", "rejected"),
            processing_class=TOKENIZER,
            callbacks=[turns],
        )

    rows = [
        {"prompt_ids": row["prompt"], "chosen_ids": row["chosen"], "rejected_ids": row["rejected"]} for row in ROWS
    ]
    if precomputed:
        # What they are makes no difference to the time of a step.
        rows = [{**row, "ref_chosen_logps": -100.0, "ref_rejected_logps": -100.0} for row in rows]
    train(make, rows)


def dpo_cached():
    dpo(precomputed=True)


def reward():
    def make(trl, settings, turns):
        model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = TOKENIZER.pad_token_id
        return trl.RewardTrainer(
            model=model,
            args=trl.RewardConfig(**settings),
            train_dataset=texts("chosen", "rejected"),
            processing_class=TOKENIZER,
            callbacks=[turns],
        )

    rows = [
        {"chosen_ids": row["prompt"] + row["chosen"], "rejected_ids": row["prompt"] + row["rejected"]} for row in ROWS
    ]
    train(make, rows)


def grpo():
    """4 answers of 48 tokens to each prompt; BATCH is the number of answers."""
    import trl
    from datasets import Dataset

    samples, new_tokens = 4, 48
    turns = Turns()
    trainer = trl.GRPOTrainer(
        model=load(torch.float32),
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            num_generations=samples,
            max_completion_length=new_tokens,
            generation_kwargs={"min_new_tokens": new_tokens},
            beta=0.04,
            shuffle_dataset=False,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=work["dtype"] == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
        ),
        # As ours: the share of even ids.
        reward_funcs=lambda completion_ids, **_: [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids],
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(BATCH // samples * STEPS)]),
        processing_class=TOKENIZER,
        callbacks=[turns],
    )
    if not hasattr(trainer, "_tokenize_prompts"):
        sys.exit("this TRL makes ids of prompts elsewhere: this script is for another version")

    def ids_of(prompts):
        """The ids that ours gets, by the number that stands for each prompt."""
        ids = [ROWS[int(prompt)]["prompt"] for prompt in prompts]
        turns.read = {"tokens": sum(map(len, ids)) + len(ids) * new_tokens, "id_sum": sum(map(sum, ids))}
        return ids, None, {}

    trainer._tokenize_prompts = ids_of
    say("ready", versions=f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    trainer.train()
    wait()
    done()


def ppo():
    """48 sampled tokens to each prompt, 4 passes over them; policy, critic, reference and reward model apart."""
    import trl
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    new_tokens = 48

    def classifier():
        model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = TOKENIZER.pad_token_id
        return model

    TOKENIZER.padding_side = "left"
    dataset = Dataset.from_list([{"input_ids": row["prompt"]} for row in ROWS])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            total_episodes=BATCH * STEPS,
            per_device_train_batch_size=BATCH,
            local_rollout_forward_batch_size=BATCH,
            num_mini_batches=1,
            num_ppo_epochs=4,
            response_length=new_tokens,
            temperature=1.0,
            stop_token=None,
            num_sample_generations=0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=work["dtype"] == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
        ),
        processing_class=TOKENIZER,
        model=load(torch.float32),
        ref_model=load(torch.float32),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(BATCH)),
    )
    turn = {}

    class Steps:
        """The prompts that ours gets, one step's at a time and in its order."""

        def __iter__(self):
            for step in range(STEPS):
                prompts = [row["prompt"] for row in ROWS[step * BATCH : (step + 1) * BATCH]]
                width = max(map(len, prompts))
                if not wait():
                    done()
                    os._exit(0)
                turn["read"] = {
                    "tokens": sum(map(len, prompts)) + BATCH * new_tokens,
                    "id_sum": sum(map(sum, prompts)),
                }
                turn["start"] = time.perf_counter()
                yield {"input_ids": torch.tensor([[TOKENIZER.pad_token_id] * (width - len(p)) + p for p in prompts])}

    trainer.dataloader = Steps()
    # The last thing that a step does.
    schedule = trainer.lr_scheduler.step

    def end_of_step(*args, **kwargs):
        say("step", seconds=time.perf_counter() - turn["start"], **turn["read"])
        return schedule(*args, **kwargs)

    trainer.lr_scheduler.step = end_of_step
    say("ready", versions=f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    trainer.train()
    wait()
    done()


TASKS = {task.__name__: task for task in [forward_backward, generate, greedy, sft, dpo, dpo_cached, reward, grpo, ppo]}
TASKS["ppo_shared"] = ppo  # it has no shared trunk

if __name__ == "__main__":
    TASKS[work["task"]]()
