//! A whole PPO update of small transformers against TRL 1.12: rollout arithmetic, every
//! minibatch's losses and gradient norm, the log, and the weights at the end.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Golden, assert_close, assert_number, model_dir, number};
use rlhf_models::{CausalLm, LoadOptions, SequenceClassifier, ValueHeadModel};
use rlhf_ppo::core::{
    Completions, Device, FinishReason, LogprobOptions, Policy, RewardModel, Sequence, SequenceBatch,
};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{
    KlControl, MinibatchStats, MissingEos, PpoConfig, PpoTrainer, Rollout, truncate_after_stop,
};
use serde_json::Value;

type Trainer = PpoTrainer<CausalLm, ValueHeadModel>;

struct Case {
    golden: Golden,
    eos: i64,
    pad: i64,
    /// TRL's tensors always have room for the longest response that is allowed.
    width: i64,
}

impl Case {
    fn load(name: &str) -> Self {
        let golden = Golden::load(name);
        let number = |name: &str| golden.json["params"][name].as_i64().unwrap();
        Self {
            eos: number("eos_token_id"),
            pad: number("pad_token_id"),
            width: number("response_length"),
            golden,
        }
    }

    fn param(&self, name: &str) -> &Value {
        &self.golden.json["params"][name]
    }

    fn config(&self) -> PpoConfig {
        let float = |name: &str| self.param(name).as_f64().unwrap();
        let count = |name: &str| self.param(name).as_u64().unwrap() as usize;
        let mut config = PpoConfig {
            batch_size: count("batch_size"),
            ppo_epochs: count("num_ppo_epochs"),
            minibatches: count("num_mini_batches"),
            microbatch_size: 2,
            cliprange: float("cliprange"),
            cliprange_value: float("cliprange_value"),
            vf_coef: float("vf_coef"),
            gamma: float("gamma"),
            lam: float("lam"),
            kl_control: KlControl::Fixed {
                kl_coef: float("kl_coef"),
            },
            kl_estimator: serde_json::from_value(self.param("kl_estimator").clone()).unwrap(),
            missing_eos: match self.param("missing_eos_penalty").as_f64() {
                Some(penalty) => MissingEos::Subtract(penalty),
                None => MissingEos::Keep,
            },
            ..PpoConfig::trl()
        };
        config.generation.max_new_tokens = self.width as usize;
        config.generation.stop_token_ids = vec![self.eos];
        config.generation.sampling.temperature = float("temperature");
        config.update.optimizer.lr = float("learning_rate");
        config.update.optimizer.weight_decay = float("weight_decay");
        config.update.optimizer.eps = float("adam_epsilon");
        config
    }

    fn trainer(&self) -> Trainer {
        let dir = |role: &str| model_dir(self.param(role).as_str().unwrap());
        let options = LoadOptions {
            device: Device::Cpu,
            ..LoadOptions::default()
        };
        PpoTrainer::new(
            self.config(),
            CausalLm::from_pretrained(dir("policy"), &options).unwrap(),
            ValueHeadModel::from_pretrained(dir("value"), &options).unwrap(),
            CausalLm::from_pretrained(dir("ref"), &options).unwrap(),
            SequenceClassifier::from_pretrained(dir("reward"), &options).unwrap(),
        )
        .unwrap()
    }

    /// Prompts are padded on the left; the model wrote on after its stop tokens.
    fn sequences(&self) -> Vec<Sequence> {
        sequences(&self.golden, self.pad, "stage/responses")
    }

    fn completions(&self) -> Completions {
        let mut sequences = self.sequences();
        let finish_reasons = sequences
            .iter_mut()
            .map(|s| truncate_after_stop(&mut s.response, &[self.eos]))
            .collect();
        Completions {
            finish_reasons,
            ..Completions::written(SequenceBatch::new(sequences).unwrap())
        }
    }

    /// TRL's `[B, W]` tensor of this name, with 0 for the fillers outside the mask.
    fn stage(&self, name: &str, padding_mask: &str) -> Tensor {
        let tensor = self.golden.tensor(&format!("stage/{name}"));
        tensor.masked_fill(&self.golden.tensor(padding_mask).eq(1), 0.0)
    }

    fn check_rollout(&self, rollout: &Rollout) {
        let tolerance = self.golden.tolerance("stage_abs");
        let token = "stage/padding_mask";
        let state = "stage/padding_mask_p1";
        for (name, got, mask) in [
            ("logprobs", &rollout.logprobs, token),
            ("ref_logprobs", &rollout.ref_logprobs, token),
            ("kl", &rollout.kl, token),
            ("advantages", &rollout.advantages, token),
            ("values", &rollout.values, state),
            ("rewards", &rollout.rewards, state),
            ("returns", &rollout.returns, state),
        ] {
            let missing = (self.width - got.size()[1]).max(0);
            let got = got.constant_pad_nd([0, missing]);
            let got = got.narrow(1, 0, self.width);
            assert_close(name, &got, &self.stage(name, mask), tolerance, 0.0);
        }
        let scores = self.golden.tensor("stage/scores");
        assert_close("scores", &rollout.final_scores, &scores, tolerance, 0.0);
        let before_whitening = (&rollout.returns - &rollout.values).narrow(1, 0, self.width);
        let want = self.stage("advantages_before_whitening", state);
        assert_close("raw advantages", &before_whitening, &want, tolerance, 0.0);
    }

    /// Returns the mean ratio as TRL has it.
    fn check_minibatch(
        &self,
        index: usize,
        rows: &[usize],
        rollout: &Rollout,
        got: &MinibatchStats,
    ) -> f64 {
        let want = &self.golden.json["expect"]["minibatches"][index];
        let want_of = |name: &str| want[name].as_f64().unwrap();
        let (abs, rel) = (
            self.golden.tolerance("loss_abs"),
            self.golden.tolerance("loss_rel"),
        );
        let elements = (rows.len() as i64 * self.width) as f64;
        let tokens = tokens_of(rollout, rows);
        // TRL averages these two over all columns; padding has ratio 1 and KL 0 there.
        let ratio = (got.ratio * tokens + elements - tokens) / elements;
        let approx_kl = got.approx_kl * tokens / elements;
        for (name, got, want) in [
            ("loss", got.loss, want_of("loss")),
            ("pg_loss", got.policy_loss, want_of("pg_loss")),
            ("vf_loss", got.value_loss, want_of("vf_loss")),
            ("vf_clipfrac", got.value_clipfrac, want_of("vf_clipfrac")),
            (
                "pg_clipfrac",
                got.policy_clipfrac,
                self.stat("pg_clipfrac", index),
            ),
            ("ratio", ratio, want_of("ratio_mean")),
            ("approxkl", approx_kl, self.stat("approxkl", index)),
        ] {
            assert_number(&format!("{name} of minibatch {index}"), got, want, abs, rel);
        }
        let norm = want["grad_norm"]["total"].as_f64().unwrap();
        let rel = self.golden.tolerance("grad_norm_rel");
        assert_number("grad_norm", got.grad_norm, norm, 0.0, rel);
        ratio
    }

    fn stat(&self, name: &str, index: usize) -> f64 {
        let flat = self.golden.tensor(&format!("stats/{name}")).view(-1);
        flat.double_value(&[index as i64])
    }

    /// TRL's entropy is a mean over all columns, padding included, so it is the mean of the
    /// *uncut* responses, and only comparable where none of them holds padding.
    fn check_entropy(&self, index: usize, rows: &[usize], trainer: &Trainer) -> bool {
        let sequences = self.sequences();
        let rows: Vec<Sequence> = rows.iter().map(|&r| sequences[r].clone()).collect();
        if rows.iter().any(|s| s.response.contains(&self.pad)) {
            return false;
        }
        let options = LogprobOptions {
            temperature: trainer.config().temperature(),
            entropy: true,
        };
        let batch = SequenceBatch::new(rows).unwrap();
        let out = trainer.policy().logprobs(&batch, &options).unwrap();
        let got = number(&out.entropy.unwrap().mean(Kind::Double));
        let rel = self.golden.tolerance("loss_rel");
        assert_number("entropy", got, self.stat("entropy", index), 0.0, rel);
        true
    }

    fn check_log(&self, rollout: &Rollout, minibatches: &[MinibatchStats], ratios: &[f64]) {
        let ratios = Tensor::from_slice(ratios);
        let tolerance = self.golden.tolerance("loss_abs");
        let log = &self.golden.json["expect"]["log"];
        let rows = rollout.len() as f64;
        let kl = rollout.kl_per_sequence();
        let score = number(&rollout.final_scores.mean(Kind::Double));
        // What TRL calls entropy here is an estimate from the sampled tokens.
        let surprise = -number(&rollout.logprobs.sum(Kind::Double));
        let mean = |f: fn(&MinibatchStats) -> f64| {
            minibatches.iter().map(f).sum::<f64>() / minibatches.len() as f64
        };
        let finished = rollout.completions.finish_reasons.iter();
        let finished = finished.filter(|&&f| f == FinishReason::Stop).count();
        for (name, got) in [
            ("objective/kl", kl),
            ("objective/entropy", surprise / rows),
            ("objective/non_score_reward", -rollout.kl_coef * kl),
            ("objective/rlhf_reward", score - rollout.kl_coef * kl),
            ("objective/scores", score),
            ("policy/clipfrac_avg", mean(|m| m.policy_clipfrac)),
            ("loss/policy_avg", mean(|m| m.policy_loss)),
            ("loss/value_avg", mean(|m| m.value_loss)),
            ("val/clipfrac_avg", mean(|m| m.value_clipfrac)),
            ("val/ratio", number(&ratios.mean(Kind::Double))),
            ("val/ratio_var", number(&ratios.var(true))),
        ] {
            let want = log[name].as_f64().unwrap();
            assert_number(
                name,
                got,
                want,
                tolerance,
                self.golden.tolerance("loss_rel"),
            );
        }
        assert_eq!(log["val/num_eos_tokens"].as_u64(), Some(finished as u64));
    }

    fn check_weights(&self, trainer: &Trainer) {
        let index = self.golden.tensor("final/flat_index");
        let value = self.golden.tensor("final/value");
        let tolerance = self.golden.tolerance("final_weights_abs");
        let parameters = rlhf_ppo::core::joined_parameters(&[
            ("policy", trainer.policy()),
            ("value_model", trainer.value_model()),
        ]);
        let names = self.golden.json["expect"]["final_weight_names"]
            .as_array()
            .unwrap();
        for (row, name) in names.iter().enumerate() {
            let name = name.as_str().unwrap();
            let (_, tensor) = parameters
                .iter()
                .find(|(n, _)| n == name)
                .unwrap_or_else(|| {
                    let known: Vec<_> = parameters.iter().map(|(n, _)| n).collect();
                    panic!("no parameter {name} among {known:?}")
                });
            let index = index.get(row as i64);
            let used = index.ge(0);
            let got = tensor.detach().contiguous().view(-1);
            let got = got.index_select(0, &index.masked_select(&used));
            let want = value.get(row as i64).masked_select(&used);
            assert_close(name, &got, &want, tolerance, 0.0);
        }
    }

    /// Returns how many minibatches' entropies could be compared.
    fn run(&self) -> usize {
        let mut trainer = self.trainer();
        let rollout = trainer.evaluate(self.completions()).unwrap();
        self.check_rollout(&rollout);
        let permutations: Vec<Vec<usize>> =
            serde_json::from_value(self.param("permutations").clone()).unwrap();
        let size = rollout.len() / trainer.config().minibatches;
        let (mut minibatches, mut ratios) = (Vec::new(), Vec::new());
        let mut entropies = 0;
        for rows in permutations.iter().flat_map(|p| p.chunks(size)) {
            let index = minibatches.len();
            entropies += usize::from(self.check_entropy(index, rows, &trainer));
            let done = trainer.update_minibatch(&rollout, rows).unwrap().unwrap();
            ratios.push(self.check_minibatch(index, rows, &rollout, &done));
            minibatches.push(done);
        }
        self.check_log(&rollout, &minibatches, &ratios);
        self.check_weights(&trainer);
        entropies
    }
}

fn sequences(golden: &Golden, pad: i64, responses: &str) -> Vec<Sequence> {
    let rows = |name: &str| -> Vec<Vec<i64>> { Vec::try_from(golden.tensor(name)).unwrap() };
    let prompts = rows("queries").into_iter().map(|row| {
        let start = row.iter().position(|&id| id != pad).unwrap();
        row[start..].to_vec()
    });
    prompts
        .zip(rows(responses))
        .map(|(prompt, response)| Sequence::new(prompt, response))
        .collect()
}

fn tokens_of(rollout: &Rollout, rows: &[usize]) -> f64 {
    let sequences = rollout.completions.batch.sequences();
    rows.iter()
        .map(|&r| sequences[r].response.len())
        .sum::<usize>() as f64
}

#[test]
fn gpt2_with_k3_and_a_missing_eos_penalty() {
    let entropies = Case::load("e2e_gpt2_k3_penalty").run();
    assert_eq!(entropies, 1);
}

#[test]
fn llama_with_k1_and_a_temperature() {
    Case::load("e2e_llama_k1").run();
}

#[test]
fn scores_are_read_at_the_last_token_that_is_kept() {
    let golden = Golden::load("get_reward");
    let number = |name: &str| golden.json["params"][name].as_i64().unwrap();
    let (eos, pad) = (number("eos_token_id"), number("pad_token_id"));
    let mut sequences = sequences(&golden, pad, "responses");
    for sequence in &mut sequences {
        truncate_after_stop(&mut sequence.response, &[eos]);
    }
    let model = model_dir(golden.json["params"]["model"].as_str().unwrap());
    let reward = SequenceClassifier::from_pretrained(model, &LoadOptions::default()).unwrap();
    let completions = Completions::written(SequenceBatch::new(sequences).unwrap());
    let scores = reward.score(&completions).unwrap();
    golden.close("scores", &scores, &golden.tensor("final_rewards"));
}
