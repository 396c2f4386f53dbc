//! Whole runs of GRPO, DAPO's loss and RLOO on a small transformer, against TRL 1.16.

use std::sync::Arc;

use rlhf_models::{CausalLm, LoadOptions};
use rlhf_ppo::core::{
    Completions, Device, FinishReason, Result, RewardModel, Sequence, SequenceBatch,
};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{
    AdvantageScale, Aggregation, GroupMinibatchStats, GroupRollout, GrpoConfig, GrpoTrainer,
    KlEstimator, KlPenalty, KlWeight, Objective, OldLogprobs,
};
use serde_json::Value;

use crate::common::{Golden, assert_close, assert_number, model_dir};

/// The rewards that the golden forces.
struct Given(Vec<f64>);

impl RewardModel for Given {
    fn score(&self, _: &Completions) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.0))
    }
}

struct Case {
    golden: Golden,
}

impl Case {
    fn param(&self, name: &str) -> &Value {
        &self.golden.json["params"][name]
    }

    fn float(&self, name: &str) -> f64 {
        self.param(name).as_f64().unwrap()
    }

    fn count(&self, name: &str) -> usize {
        self.param(name).as_u64().unwrap() as usize
    }

    fn config(&self) -> GrpoConfig {
        let beta = self.float("beta");
        let mut config = match self.param("loss_type").as_str() {
            Some("grpo") => GrpoConfig {
                kl: KlPenalty::InLoss {
                    kl_coef: beta,
                    estimator: KlEstimator::K3,
                    weight: KlWeight::Ratio,
                },
                ..GrpoConfig::grpo()
            },
            Some("dapo") => GrpoConfig {
                aggregation: Aggregation::GlobalTokens,
                ..GrpoConfig::trl()
            },
            None => GrpoConfig {
                kl: KlPenalty::InReward {
                    kl_coef: beta,
                    estimator: KlEstimator::K1,
                },
                ..GrpoConfig::rloo()
            },
            other => panic!("{other:?}"),
        };
        if let Some("batch") = self.param("scale_rewards").as_str() {
            config.scale = AdvantageScale::Batch;
        }
        let low = self.float("epsilon");
        let high = self.param("epsilon_high").as_f64().unwrap_or(low);
        config.objective = Objective::asymmetric(low, high);
        config.num_iterations = self.count("num_iterations");
        config.microbatch_size = 4;
        config.old_logprobs = OldLogprobs::Recomputed;
        config.generation.samples_per_prompt = self.count("num_generations");
        config.generation.max_new_tokens = self.count("max_completion_length");
        config.generation.sampling.temperature = self.float("temperature");
        config.update.optimizer.lr = self.float("learning_rate");
        config.update.max_grad_norm = Some(self.float("max_grad_norm"));
        config
    }

    fn trainer(&self) -> GrpoTrainer<CausalLm> {
        let load = |role: &str| {
            let options = LoadOptions {
                device: Device::Cpu,
                ..LoadOptions::default()
            };
            let dir = self.param(role).as_str()?;
            Some(CausalLm::from_pretrained(model_dir(dir), &options).unwrap())
        };
        let rewards = self.golden.json["expect"]["rewards"].clone();
        let rewards = Given(serde_json::from_value(rewards).unwrap());
        let policy = load("model").unwrap();
        match load("ref_model") {
            Some(reference) => {
                GrpoTrainer::with_reference(self.config(), policy, reference, rewards)
            }
            None => GrpoTrainer::new(self.config(), policy, rewards),
        }
        .unwrap()
    }

    fn completions(&self) -> Completions {
        let lists = |name: &str| -> Vec<Vec<i64>> {
            serde_json::from_value(self.golden.json["expect"][name].clone()).unwrap()
        };
        let group = self.count("num_generations");
        let prompts: Vec<Arc<[i64]>> = lists("prompts").into_iter().map(Arc::from).collect();
        let sequences: Vec<Sequence> = lists("completions")
            .into_iter()
            .enumerate()
            .map(|(i, response)| Sequence::new(Arc::clone(&prompts[i / group]), response))
            .collect();
        let finish_reasons = sequences
            .iter()
            .map(|s| match s.response.last() {
                Some(0) => FinishReason::Stop,
                _ => FinishReason::Length,
            })
            .collect();
        Completions {
            finish_reasons,
            ..Completions::written(SequenceBatch::new(sequences).unwrap())
        }
    }

    /// Where the golden's shuffled rows are in ours.
    fn rows(&self, rollout: &GroupRollout) -> Vec<i64> {
        let lists = |name: &str| -> Vec<Vec<i64>> {
            Vec::try_from(self.golden.tensor(&format!("step1/{name}"))).unwrap()
        };
        let ids = lists("completion_ids");
        let sequences = rollout.completions.batch.sequences();
        ids.iter()
            .zip(lists("completion_mask"))
            .map(|(ids, mask)| {
                let length = mask.iter().sum::<i64>() as usize;
                let row = sequences.iter().position(|s| s.response == ids[..length]);
                row.unwrap() as i64
            })
            .collect()
    }

    fn check_rollout(&self, rollout: &GroupRollout) {
        let rows = Tensor::from_slice(&self.rows(rollout));
        let advantages = Tensor::from_slice(&rollout.advantages).index_select(0, &rows);
        let want = self.golden.tensor("step1/advantages");
        assert_close("advantages", &advantages, &want, 1e-4, 0.0);
        let tolerance = self.golden.tolerance("logps_abs");
        let mask = rollout.mask.index_select(0, &rows);
        let names = [
            ("step1/old_per_token_logps", &rollout.old_logprobs),
            ("step1/ref_per_token_logps", &rollout.ref_logprobs),
        ];
        for (name, got) in names {
            let listed = self.golden.json["tensors"].get(name).is_some();
            if let (Some(got), true) = (got, listed) {
                let want = self
                    .golden
                    .tensor(name)
                    .masked_fill(&mask.logical_not(), 0.0);
                let got = got.index_select(0, &rows);
                assert_close(name, &got, &want, tolerance, 0.0);
            }
        }
        if self.golden.json["tensors"].get("step1/old_logps").is_some() {
            let old = rollout
                .old_logprobs
                .as_ref()
                .unwrap()
                .index_select(0, &rows);
            let sums = old.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            let want = self.golden.tensor("step1/old_logps");
            assert_close("old_logps", &sums, &want, tolerance, 0.0);
        }
    }

    fn check_step(&self, index: usize, got: &GroupMinibatchStats) {
        let want = &self.golden.json["expect"]["steps"][index];
        let abs = self.golden.tolerance("loss_and_metrics_abs");
        let rel = self.golden.tolerance("loss_and_metrics_rel");
        let mut compared = 0;
        for (name, got) in [
            ("loss", got.loss),
            ("grad_norm", got.grad_norm),
            ("learning_rate", got.lr),
            ("entropy", got.entropy),
            ("clip_ratio/low_mean", got.clipfrac_low),
            ("clip_ratio/high_mean", got.clipfrac_high),
            (
                "clip_ratio/region_mean",
                got.clipfrac_low + got.clipfrac_high,
            ),
        ] {
            let want = want[name].as_f64().unwrap();
            assert_number(&format!("{name} of step {index}"), got, want, abs, rel);
            compared += 1;
        }
        assert_eq!(compared, 7);
        if let KlPenalty::InLoss { .. } = self.config().kl {
            let want = want["kl"].as_f64().unwrap();
            assert_number("kl", got.kl_in_loss, want, abs, rel);
        }
        // RLOO logs the divergence per token, once a rollout; ours is per sequence.
        if let (KlPenalty::InReward { .. }, Some(want)) = (self.config().kl, want["kl"].as_f64()) {
            let batch = self.completions().batch;
            let tokens_each = batch.response_tokens() as f64 / batch.len() as f64;
            assert_number("kl", got.kl.unwrap() / tokens_each, want, abs, rel);
        }
    }

    fn check_weights(&self, trainer: &GrpoTrainer<CausalLm>) {
        let index = self.golden.tensor("final/flat_index");
        let value = self.golden.tensor("final/value");
        let tolerance = self.golden.tolerance("final_weights_abs");
        let names = self.golden.json["expect"]["final_weight_names"]
            .as_array()
            .unwrap();
        for (row, name) in names.iter().enumerate() {
            let name = name.as_str().unwrap();
            let parameters = trainer.updater().parameters();
            let (_, tensor) = parameters.iter().find(|(n, _)| n == name).unwrap();
            let index = index.get(row as i64);
            let used = index.ge(0);
            let got = tensor.detach().contiguous().view(-1);
            let got = got.index_select(0, &index.masked_select(&used));
            let want = value.get(row as i64).masked_select(&used);
            assert_close(name, &got, &want, tolerance, 0.0);
        }
    }

    /// The rollout is used for `num_iterations` steps, then the same answers are evaluated anew.
    fn run(name: &str) {
        let case = Self {
            golden: Golden::load(name),
        };
        let mut trainer = case.trainer();
        let steps = case.count("max_steps");
        let mut rollout = trainer.evaluate(case.completions()).unwrap();
        case.check_rollout(&rollout);
        for step in 0..steps {
            if step > 0 && step % case.count("num_iterations") == 0 {
                rollout = trainer.evaluate(case.completions()).unwrap();
            }
            let groups: Vec<usize> = (0..rollout.groups()).collect();
            let done = trainer.update_minibatch(&rollout, &groups).unwrap();
            case.check_step(step, &done.unwrap());
        }
        case.check_weights(&trainer);
    }
}

#[test]
fn grpo_with_a_kl_penalty() {
    Case::run("grpo/e2e_grpo_beta");
}

#[test]
fn the_loss_of_dapo_over_three_iterations() {
    Case::run("grpo/e2e_dapo");
}

#[test]
fn rloo_with_the_divergence_in_the_reward() {
    Case::run("grpo/e2e_rloo");
}
