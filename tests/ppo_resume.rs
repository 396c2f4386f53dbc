//! PPO on real models gives the same bytes each time, however often it was stopped or killed.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/child_process.rs"]
mod child_process;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use child_process::kill_until_done;
use rlhf_core::{
    CheckpointConfig, CheckpointStore, Event, JsonlObserver, Observer, Parameters, Tensor,
};
use rlhf_models::{CausalLm, LoadOptions, SequenceClassifier, ValueHeadModel};
use rlhf_ppo::{KlControl, PpoConfig, PpoTrainer};

const STEPS: u64 = 5;
type Trainer = PpoTrainer<CausalLm, ValueHeadModel>;

fn model(name: &str) -> String {
    format!("{}/tests/goldens/models/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn trainer(seed: u64) -> Trainer {
    let options = LoadOptions::default();
    let policy = CausalLm::from_pretrained(model("gpt2"), &options).unwrap();
    let reference = policy.try_clone().unwrap();
    let reward = SequenceClassifier::from_pretrained(model("gpt2_rm"), &options).unwrap();
    let values = ValueHeadModel::from_pretrained(model("gpt2_rm"), &options).unwrap();
    let mut config = PpoConfig {
        seed,
        batch_size: 4,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 1,
        kl_control: KlControl::ziegler(),
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![0];
    config.update.optimizer.lr = 1e-3;
    let config = config.annealed(STEPS);
    PpoTrainer::new(config, policy, values, reference, reward).unwrap()
}

/// Six prompts: an epoch ends in the middle of a batch of four.
fn prompts() -> Vec<Arc<[i64]>> {
    let prompt = |i: i64| (0..=i).map(|t| 10 + 7 * i + t).collect();
    (0..6).map(prompt).collect()
}

fn weights(trainer: &Trainer) -> BTreeMap<String, Tensor> {
    let policy = trainer.policy().named_parameters();
    let values = trainer.value_model().named_parameters();
    let named = |prefix: &'static str| move |(name, tensor)| (format!("{prefix}.{name}"), tensor);
    let mut weights: BTreeMap<_, _> = policy.into_iter().map(named("policy")).collect();
    weights.extend(values.into_iter().map(named("value")));
    weights
}

#[track_caller]
fn assert_same(a: &Trainer, b: &Trainer) {
    let (a, b) = (weights(a), weights(b));
    assert!(a.len() > 20 && a.keys().eq(b.keys()));
    for (name, weight) in a {
        assert!(weight.equal(&b[&name]), "{name} differs");
    }
}

/// Trains with checkpoints and a metrics file in `dir`, and goes on from what is there. Stops
/// after `stop_after`.
fn run(dir: &Path, stop_after: u64) -> Trainer {
    let mut trainer = trainer(3);
    let checkpoints = CheckpointConfig {
        dir: dir.join("checkpoints"),
        every: 1,
        keep: 2,
    };
    let store = CheckpointStore::open(&checkpoints.dir, checkpoints.keep).unwrap();
    let done = trainer.resume(&store).unwrap();
    let metrics = JsonlObserver::resume(dir.join("metrics.jsonl"), done).unwrap();
    let mut observers: Vec<Box<dyn Observer>> = vec![
        Box::new(metrics),
        Box::new(move |event: &Event<'_>| {
            Ok(match event.step >= stop_after {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        }),
    ];
    trainer
        .train_with_checkpoints(&prompts(), STEPS, &mut observers, &checkpoints)
        .unwrap();
    trainer
}

/// The lines of the metrics file, but for what tells the time.
fn metrics(dir: &Path) -> Vec<serde_json::Map<String, serde_json::Value>> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let line: serde_json::Map<_, _> = serde_json::from_str(line).unwrap();
        let timeless = |key: &str| !key.contains("time");
        line.into_iter().filter(|(key, _)| timeless(key)).collect()
    });
    lines.collect()
}

#[test]
fn equal_seeds_give_equal_weights_and_others_do_not() {
    let [mut a, mut b, mut c] = [trainer(3), trainer(3), trainer(4)];
    for trainer in [&mut a, &mut b, &mut c] {
        trainer.train(&prompts(), 2, &mut []).unwrap();
    }
    assert_same(&a, &b);
    let (a, c) = (weights(&a), weights(&c));
    assert!(a.iter().any(|(name, weight)| !weight.equal(&c[name])));
}

#[test]
fn a_run_stopped_after_any_step_ends_with_the_same_weights_and_metrics() {
    let whole = tempfile::tempdir().unwrap();
    let uninterrupted = run(whole.path(), STEPS);
    assert_eq!(metrics(whole.path()).len(), STEPS as usize);
    for stop_after in 1..STEPS {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run(dir.path(), stop_after).steps_done(), stop_after);
        let resumed = run(dir.path(), STEPS);
        assert_eq!(resumed.steps_done(), STEPS);
        assert_same(&resumed, &uninterrupted);
        assert_eq!(metrics(dir.path()), metrics(whole.path()));
    }
}

/// The child process of the next test, and nothing in this one.
#[test]
fn child_that_is_killed() {
    if let Some(dir) = child_process::folder_of_child() {
        run(&dir, STEPS);
    }
}

#[test]
fn a_run_killed_at_any_moment_ends_with_the_same_weights_and_metrics() {
    let whole = tempfile::tempdir().unwrap();
    let uninterrupted = run(whole.path(), STEPS);
    let dir = tempfile::tempdir().unwrap();
    // Each child lives a little longer than the one before it, so that the kills fall on every
    // part of a step, and the run gets done.
    let lives = (1..400).map(|attempt| Duration::from_millis(40 * attempt));
    kill_until_done("child_that_is_killed", dir.path(), lives);
    let resumed = run(dir.path(), STEPS);
    assert_eq!(resumed.steps_done(), STEPS);
    assert_same(&resumed, &uninterrupted);
    assert_eq!(metrics(dir.path()), metrics(whole.path()));
}
