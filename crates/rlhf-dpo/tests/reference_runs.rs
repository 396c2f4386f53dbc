//! Whole runs of TRL's trainers of comparisons, DPO, CPO and ORPO: a few steps on a dozen pairs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/training_case.rs"]
mod training_case;

use std::path::Path;

use rlhf_dpo::core::{Preference, PreferenceBatch};
use rlhf_dpo::tch::Tensor;
use rlhf_dpo::{
    Divergence, DpoConfig, DpoLoss, DpoTrainer, Objective, Overlong, PairWeighting, Reference,
    ReferenceSync, RewardShift, ScreenConfig, screen_pairs,
};
use rlhf_models::{CausalLm, LoadOptions};
use serde_json::Value;
use training_case::{TrainingCase, model_dir, preference_pairs};

const METRICS: [(&str, &str); 6] = [
    ("dpo/loss", "loss"),
    ("dpo/grad_norm", "grad_norm"),
    ("dpo/rewards/chosen", "rewards/chosen"),
    ("dpo/rewards/rejected", "rewards/rejected"),
    ("dpo/rewards/accuracy", "rewards/accuracies"),
    ("dpo/rewards/margin", "rewards/margins"),
];
const SUMS: [(&str, &str); 2] = [
    ("dpo/logprobs/chosen", "logps/chosen"),
    ("dpo/logprobs/rejected", "logps/rejected"),
];
const AVERAGES: [(&str, &str); 2] = [
    ("dpo/logprobs/chosen_per_token", "logps/chosen"),
    ("dpo/logprobs/rejected_per_token", "logps/rejected"),
];

/// The cases of a trainer that begin with `prefix`.
fn cases(trainer: &str, prefix: &str) -> Vec<TrainingCase> {
    let dir = format!("{}/tests/goldens/{trainer}", env!("CARGO_MANIFEST_DIR"));
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    let read = |name: &String| TrainingCase::read(&format!("{trainer}/{name}"));
    names.iter().map(read).collect()
}

fn load(case: &TrainingCase, param: &str) -> CausalLm {
    let folder = Path::new(case.param(param).as_str().unwrap());
    let dir = model_dir(folder.strip_prefix("models").unwrap().to_str().unwrap());
    CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap()
}

fn number(case: &TrainingCase, param: &str) -> f64 {
    case.param(param).as_f64().unwrap()
}

fn dpo_loss_of(case: &TrainingCase, name: &str) -> DpoLoss {
    let label_smoothing = number(case, "label_smoothing");
    match name {
        "sigmoid" => DpoLoss::default(), // TRL ignores its label smoothing here
        "robust" => DpoLoss::Robust { label_smoothing },
        "exo_pair" => DpoLoss::ExoPair { label_smoothing },
        "aot" => DpoLoss::Aot { label_smoothing },
        "aot_unpaired" => DpoLoss::AotUnpaired { label_smoothing },
        "discopop" => DpoLoss::Discopop {
            temperature: number(case, "discopop_tau"),
        },
        "bco_pair" => DpoLoss::BcoPair {
            shift: RewardShift::None,
        },
        simple => serde_json::from_value(simple.into()).unwrap(),
    }
}

fn dpo_objective(case: &TrainingCase) -> Objective {
    let names = case.param("loss_type").as_array().unwrap();
    let weights = case.param("loss_weights");
    let losses = names.iter().enumerate().map(|(i, name)| {
        let loss = dpo_loss_of(case, name.as_str().unwrap());
        (loss, weights[i].as_f64().unwrap_or(1.0))
    });
    let mut objective = Objective::sum(losses, number(case, "beta"));
    objective.divergence = match case.param("f_divergence_type").as_str().unwrap() {
        "reverse_kl" => Divergence::ReverseKl,
        "forward_kl" => Divergence::ForwardKl,
        "js_divergence" => Divergence::JensenShannon,
        "alpha_divergence" => Divergence::Alpha {
            alpha: number(case, "f_alpha_divergence_coef"),
        },
        other => panic!("unknown divergence {other}"),
    };
    objective.ld_alpha = case.param("ld_alpha").as_f64();
    if case.param("use_weighting") == &Value::Bool(true) {
        objective.weighting = PairWeighting::Wpo;
    }
    objective
}

fn config(case: &TrainingCase, objective: Objective) -> DpoConfig {
    DpoConfig {
        update: case.update(),
        objective,
        sync: None,
        microbatch_size: number(case, "per_device_train_batch_size") as usize,
    }
}

fn repeat_dpo(case: &TrainingCase) {
    let mut config = config(case, dpo_objective(case));
    if case.param("sync_ref_model") == &Value::Bool(true) {
        config.sync = Some(ReferenceSync {
            every: case.param("ref_model_sync_steps").as_u64().unwrap(),
            alpha: number(case, "ref_model_mixup_alpha"),
        });
    }
    let batch_size = config.microbatch_size * number(case, "gradient_accumulation_steps") as usize;
    let mut model = load(case, "model");
    let reference = match case.param("adapter").as_str() {
        // TRL takes the policy as it is at the start.
        Some(adapter) => {
            model.load_adapter(model_dir("../").join(adapter)).unwrap();
            model.snapshot().unwrap()
        }
        None => load(case, "ref_model"),
    };
    let keep_start = ScreenConfig {
        max_length: Some(number(case, "max_length") as usize),
        overlong: Overlong::CutAnswers,
        keep_empty: true,
        keep_equal: true,
    };
    let (pairs, report) = screen_pairs(preference_pairs(), &keep_start);
    assert_eq!(report.too_long > 0, case.name.ends_with("max_length"));
    let mut trainer = DpoTrainer::new(model, reference, config).unwrap();
    for (step, pairs) in pairs.chunks(batch_size).enumerate() {
        let batch = PreferenceBatch::new(pairs.to_vec()).unwrap();
        let stats = trainer.step(&batch).unwrap();
        case.check_step(step, &stats, &METRICS);
        case.check_step(step, &stats, &SUMS);
    }
    assert_eq!(case.steps().len(), 3);
    case.check_final_weights(trainer.model());
}

#[test]
fn dpo_of_gpt2() {
    let cases = cases("dpo", "gpt2_");
    cases.iter().for_each(repeat_dpo);
    assert_eq!(cases.len(), 30);
}

#[test]
fn dpo_of_llama() {
    let cases = cases("dpo", "llama_");
    cases.iter().for_each(repeat_dpo);
    assert_eq!(cases.len(), 31);
}

/// The pairs of one step, which TRL's older trainers tokenise in their own way.
fn pairs_of_batch(holder: &TrainingCase, batch: usize) -> Vec<Preference> {
    let rows = |side: &str| -> Vec<(Vec<i64>, Vec<i64>)> {
        let tensor = |name: &str| holder.tensor(&format!("batch{batch}/{side}_{name}"));
        let row = |t: &Tensor, i: i64| Vec::<i64>::try_from(t.get(i)).unwrap();
        let (ids, masks) = (tensor("input_ids"), tensor("attention_mask"));
        let labels = tensor("labels");
        (0..ids.size()[0])
            .map(|i| {
                let cells = row(ids, i)
                    .into_iter()
                    .zip(row(masks, i))
                    .zip(row(labels, i));
                let there = cells.filter(|((_, mask), _)| *mask == 1);
                let (prompt, answer): (Vec<_>, Vec<_>) =
                    there.partition(|(_, label)| *label == -100);
                let ids = |cells: Vec<((i64, i64), i64)>| cells.iter().map(|c| c.0.0).collect();
                (ids(prompt), ids(answer))
            })
            .collect()
    };
    let both = rows("chosen").into_iter().zip(rows("rejected"));
    both.map(|((prompt, chosen), (same, rejected))| {
        assert_eq!(prompt, same);
        Preference::new(prompt, chosen, rejected)
    })
    .collect()
}

fn repeat_unreferenced(case: &TrainingCase, objective: Objective, logps: &[(&str, &str)]) {
    let batches = case.param("batches").as_str().unwrap();
    let holder = match batches {
        "in this folder" => &case.name,
        other => other,
    };
    let holder = TrainingCase::read(holder);
    let config = config(case, objective);
    let mut trainer = DpoTrainer::new(load(case, "model"), Reference::Free, config).unwrap();
    for step in 0..case.steps().len() {
        let batch = PreferenceBatch::new(pairs_of_batch(&holder, step)).unwrap();
        let stats = trainer.step(&batch).unwrap();
        case.check_step(step, &stats, &METRICS);
        case.check_step(step, &stats, logps);
        if stats.get("dpo/nll").is_some() {
            case.check_step(step, &stats, &[("dpo/nll", "nll_loss")]);
        }
        assert!(stats.get("dpo/logprobs/chosen_drift").is_none());
    }
    assert_eq!(case.steps().len(), 2);
    case.check_final_weights(trainer.model());
}

fn cpo_objective(case: &TrainingCase) -> Objective {
    let label_smoothing = number(case, "label_smoothing");
    let (alpha, gamma) = (number(case, "cpo_alpha"), number(case, "simpo_gamma"));
    let beta = number(case, "beta");
    let losses = match case.param("loss_type").as_str().unwrap() {
        "sigmoid" => {
            let cpo = DpoLoss::Cpo {
                alpha,
                label_smoothing,
            };
            return Objective::sum([(cpo, 1.0)], beta);
        }
        "simpo" => match case.param("alpha").as_f64().unwrap_or(0.0) {
            0.0 => DpoLoss::SimPo {
                gamma,
                label_smoothing,
            },
            alpha => DpoLoss::AlphaPo { alpha, gamma },
        },
        simple => serde_json::from_value(simple.into()).unwrap(),
    };
    let likelihood = (alpha > 0.0).then_some((DpoLoss::Sft, alpha));
    Objective::sum([(losses, 1.0)].into_iter().chain(likelihood), beta)
}

#[test]
fn cpo_and_simpo() {
    let cases = cases("cpo", "");
    for case in &cases {
        let averages = matches!(case.param("loss_type").as_str(), Some("simpo" | "ipo"));
        let logps = if averages { AVERAGES } else { SUMS };
        repeat_unreferenced(case, cpo_objective(case), &logps);
    }
    assert_eq!(cases.len(), 14);
}

#[test]
fn orpo() {
    let cases = cases("orpo", "");
    for case in &cases {
        let objective = Objective::sum([(DpoLoss::Orpo, 1.0)], number(case, "beta"));
        repeat_unreferenced(case, objective, &AVERAGES);
    }
    assert_eq!(cases.len(), 4);
}
