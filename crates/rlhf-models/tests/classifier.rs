//! Scores and values equal those of transformers and TRL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Case, assert_close, batch, model_dir};
use rlhf_models::core::{
    Completions, Error as CoreError, RewardModel, Scorer, Sequence, SequenceBatch, ValueModel,
};
use rlhf_models::tch::{IndexOp, Kind, Tensor};
use rlhf_models::{CausalLm, LoadOptions, SequenceClassifier, ValueHeadModel};

fn classifier(name: &str) -> SequenceClassifier {
    SequenceClassifier::from_pretrained(model_dir(name), &LoadOptions::default()).unwrap()
}

/// The case's rows, with the first token as the prompt.
fn sequences(ids: &[Vec<i64>], attention: &[Vec<i64>]) -> SequenceBatch {
    let completion: Vec<Vec<i64>> = attention
        .iter()
        .map(|row| {
            let first = row.iter().position(|&m| m == 1);
            (0..row.len())
                .map(|t| i64::from(Some(t) != first))
                .collect()
        })
        .collect();
    batch(ids, attention, &completion)
}

fn check(name: &str) {
    let case = Case::read(&format!("seqcls/{name}"));
    let model = classifier(name);
    let tolerance = case.tolerance("abs");
    for side in ["right", "left"] {
        let rows = |part: &str| case.rows(&format!("{side}/{part}"));
        let batch = sequences(&rows("input_ids"), &rows("attention_mask"));
        let want = case.tensor(&format!("{side}/scores"));
        assert_close("scores", &model.scores(&batch).unwrap(), want, tolerance);
        if model.num_labels() == 1 {
            let scores = model.score(&Completions::written(batch.clone())).unwrap();
            assert_close("score", &scores, &want.squeeze_dim(1), tolerance);
        }
        if side == "right" && model.num_labels() == 1 {
            let critic = ValueHeadModel::from_classifier(&model).unwrap();
            let values = critic.values(&batch).unwrap();
            let want = case.tensor("right/scores_all_positions").squeeze_dim(2);
            for (row, sequence) in batch.sequences().iter().enumerate() {
                let (row, length) = (row as i64, sequence.len() as i64);
                let (got, want) = (values.i((row, ..length)), want.i((row, ..length)));
                assert_close("values", &got, &want, tolerance);
            }
        }
    }
}

#[test]
fn gpt2_reward() {
    check("gpt2_rm");
}

#[test]
fn gpt2_two_labels() {
    check("gpt2_cls2");
}

#[test]
fn llama_reward() {
    check("llama_rm");
}

#[test]
fn qwen2_reward() {
    check("qwen2_rm");
}

/// Writes a language model with TRL's value head on it.
fn with_summary_head(dir: &std::path::Path, case: &Case) {
    let source = model_dir("gpt2");
    std::fs::copy(source.join("config.json"), dir.join("config.json")).unwrap();
    let mut tensors = Tensor::read_safetensors(source.join("model.safetensors")).unwrap();
    for part in ["weight", "bias"] {
        let name = format!("v_head.summary.{part}");
        let tensor = case.tensor(&name).shallow_clone();
        tensors.push((name, tensor));
    }
    let file = dir.join("model.safetensors");
    Tensor::write_safetensors(&tensors, file).unwrap();
}

#[test]
fn value_head_of_trl() {
    let case = Case::read("ppo/value_head");
    let dir = tempfile::tempdir().unwrap();
    with_summary_head(dir.path(), &case);
    let load = |dir| ValueHeadModel::from_pretrained(dir, &LoadOptions::default()).unwrap();
    let model = load(dir.path());
    let batch = sequences(&case.rows("input_ids"), &case.rows("attention_mask"));
    let values = model.values(&batch).unwrap();
    // One token of prompt: column t of the values is token t of the row.
    let want = case.tensor("values");
    for (row, sequence) in batch.sequences().iter().enumerate() {
        let (row, length) = (row as i64, sequence.len() as i64);
        let tokens = case.rows("attention_mask")[row as usize].clone();
        let start = tokens.iter().position(|&m| m == 1).unwrap() as i64;
        assert_close(
            "values",
            &values.i((row, ..length)),
            &want.i((row, start..start + length)),
            case.tolerance("abs"),
        );
    }
    let copy = tempfile::tempdir().unwrap();
    model.save_pretrained(copy.path()).unwrap();
    assert_eq!(load(copy.path()).values(&batch).unwrap(), values);
}

#[test]
fn columns_of_values() {
    let critic = ValueHeadModel::from_classifier(&classifier("gpt2_rm")).unwrap();
    let long = Sequence::new([10, 11, 12], [13, 14]);
    let short = Sequence::new([20, 21], []);
    let both = SequenceBatch::new(vec![long.clone(), short]).unwrap();
    let values = critic.values(&both).unwrap();
    assert_eq!(values.size(), [2, 3]);
    // The last column is the classifier's score of the whole sequence, whatever follows it.
    let scores = classifier("gpt2_rm").scores(&both).unwrap();
    assert_close("last", &values.i((0, 2)), &scores.i((0, 0)), 1e-6);
    assert_close("last", &values.i((1, 0)), &scores.i((1, 0)), 1e-6);
    // The first is that of the prompt alone.
    let prompt = SequenceBatch::new(vec![Sequence::new(long.prompt, [])]).unwrap();
    let score = classifier("gpt2_rm").scores(&prompt).unwrap();
    assert_close("first", &values.i((0, 0)), &score.i((0, 0)), 1e-6);
    values.sum(Kind::Float).backward();
}

#[test]
fn heads_on_a_language_model() {
    let model = CausalLm::from_pretrained(model_dir("gpt2"), &LoadOptions::default()).unwrap();
    let fresh = SequenceClassifier::from_causal_lm(&model, 2, 1).unwrap();
    let batch = SequenceBatch::new(vec![Sequence::new([3], [4, 5])]).unwrap();
    assert_eq!(fresh.scores(&batch).unwrap().size(), [1, 2]);
    let error = fresh
        .score(&Completions::written(batch.clone()))
        .unwrap_err();
    assert!(matches!(error, CoreError::InvalidConfig { .. }), "{error}");
    assert!(ValueHeadModel::from_classifier(&fresh).is_err());
    assert!(SequenceClassifier::from_causal_lm(&model, 0, 1).is_err());
    let critic = ValueHeadModel::from_causal_lm(&model, 1).unwrap();
    let other = ValueHeadModel::from_causal_lm(&model, 2).unwrap();
    let values = |m: &ValueHeadModel| m.values(&batch).unwrap();
    assert_ne!(values(&critic), values(&other));
    assert_eq!(values(&critic), values(&critic.try_clone().unwrap()));
}

#[test]
fn a_score_that_is_not_a_number_is_an_error() {
    let model = classifier("gpt2_rm");
    let guard = rlhf_models::tch::no_grad_guard();
    let weights = rlhf_models::core::Parameters::named_parameters(&model);
    let (_, mut score) = weights
        .into_iter()
        .find(|(n, _)| n == "score.weight")
        .unwrap();
    let _ = score.fill_(f64::NAN);
    drop(guard);
    let batch = SequenceBatch::new(vec![Sequence::new([3], [4, 5])]).unwrap();
    let error = model.score(&Completions::written(batch)).unwrap_err();
    assert!(
        matches!(error, CoreError::NonFinite { row: 0, .. }),
        "{error}"
    );
}
