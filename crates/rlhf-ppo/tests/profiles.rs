//! What each profile computes, against a plain re-computation of its reference, token by token in
//! f64, with the constants of that reference written out.
//!
//! TRL's is held to TRL's own numbers in `end_to_end.rs` and `pieces.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::bigram::{Bigram, STOP, TokenValue, VOCABULARY, letters};
use rlhf_ppo::core::{Completions, FinishReason, Sequence, SequenceBatch, reward_fn};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{KlControl, PpoConfig, PpoTrainer, PtxConfig, PtxStep};

/// Responses of 3, 2, 6 (the limit, unfinished) and 1 tokens.
fn written() -> Completions {
    let batch = SequenceBatch::new(vec![
        Sequence::new([1], [2, 3, STOP]),
        Sequence::new([2], [4, STOP]),
        Sequence::new([3], [2, 1, 2, 4, 2, 3]),
        Sequence::new([4], [STOP]),
    ])
    .unwrap();
    let mut completions = Completions::written(batch);
    completions.finish_reasons[2] = FinishReason::Length;
    completions
}

const LIMIT: usize = 6;

fn policy_table() -> Tensor {
    let table = Bigram::new().0.detach();
    let away = Tensor::arange(VOCABULARY * VOCABULARY, (Kind::Float, table.device()));
    table + away.cos().view([VOCABULARY, VOCABULARY]) * 0.5
}

fn value_table() -> Vec<f64> {
    vec![0.3, -0.2, 0.5, 0.1, -0.4]
}

/// Scores by row: far enough out for every clip.
const SCORES: [f64; 4] = [0.5, -20.0, 2.0, 7.0];

fn score_of(response: &str) -> f64 {
    SCORES[match response.len() {
        3 => 0,
        2 => 1,
        6 => 2,
        _ => 3,
    }]
}

/// What an implementation does, in its own terms.
struct Reference {
    temperature: f64,
    kl_coef: f64,
    clip_score: f64,
    missing_eos: Option<f64>,
    one_past_the_end: bool,
    clip_reward: f64,
    lam: f64,
    /// Denominator of the variance less n, and whether 1e-8 is a floor; `None` for no whitening.
    whitening: Option<(f64, bool)>,
}

struct Episode {
    rewards: Vec<f64>,
    advantages: Vec<f64>,
    returns: Vec<f64>,
    tokens: usize,
}

impl Reference {
    fn episodes(&self) -> Vec<Episode> {
        let completions = written();
        let (policy, reference) = (policy_table(), Bigram::new().0.detach());
        let logprob = |table: &Tensor, from: i64, to: i64| {
            let logits: Vec<f64> =
                Vec::<f64>::try_from(table.get(from).to_kind(Kind::Double)).unwrap();
            let scaled: Vec<f64> = logits.iter().map(|z| z / self.temperature).collect();
            let sum: f64 = scaled.iter().map(|z| z.exp()).sum();
            scaled[to as usize] - sum.ln()
        };
        let mut episodes: Vec<Episode> = completions
            .batch
            .sequences()
            .iter()
            .enumerate()
            .map(|(row, sequence)| {
                let states: Vec<i64> = sequence
                    .prompt
                    .iter()
                    .chain(&sequence.response)
                    .copied()
                    .collect();
                let tokens = sequence.response.len();
                let mut score = SCORES[row].clamp(-self.clip_score, self.clip_score);
                if let (Some(value), FinishReason::Length) =
                    (self.missing_eos, completions.finish_reasons[row])
                {
                    score = value;
                }
                let steps = tokens + usize::from(self.one_past_the_end && tokens < LIMIT);
                let mut rewards: Vec<f64> = (0..tokens)
                    .map(|t| {
                        let of = |table| logprob(table, states[t], states[t + 1]);
                        -self.kl_coef * (of(&policy) - of(&reference))
                    })
                    .collect();
                rewards.resize(steps, 0.0);
                rewards[steps - 1] += score;
                for reward in &mut rewards {
                    *reward = reward.clamp(-self.clip_reward, self.clip_reward);
                }
                let values: Vec<f64> = (0..steps)
                    .map(|t| value_table()[states[t] as usize])
                    .collect();
                let mut advantages = vec![0.0; steps];
                let (mut next_value, mut next) = (0.0, 0.0);
                for t in (0..steps).rev() {
                    next = rewards[t] + next_value - values[t] + self.lam * next;
                    advantages[t] = next;
                    next_value = values[t];
                }
                let returns = advantages.iter().zip(&values).map(|(a, v)| a + v).collect();
                Episode {
                    rewards,
                    advantages,
                    returns,
                    tokens,
                }
            })
            .collect();
        if let Some((less, floor)) = self.whitening {
            let all: Vec<f64> = episodes
                .iter()
                .flat_map(|e| e.advantages[..e.tokens].to_vec())
                .collect();
            let n = all.len() as f64;
            let mean = all.iter().sum::<f64>() / n;
            let variance = all.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / (n - less);
            let variance = if floor {
                variance.max(1e-8)
            } else {
                variance + 1e-8
            };
            for advantage in episodes.iter_mut().flat_map(|e| &mut e.advantages) {
                *advantage = (*advantage - mean) / variance.sqrt();
            }
        }
        episodes
    }

    /// Runs a profile on the same episodes.
    fn check(&self, mut config: PpoConfig) {
        config.generation.max_new_tokens = LIMIT;
        config.generation.stop_token_ids = vec![STOP];
        let values: Vec<f32> = value_table().iter().map(|&v| v as f32).collect();
        let mut trainer = PpoTrainer::new(
            config,
            Bigram(policy_table().set_requires_grad(true)),
            TokenValue(Tensor::from_slice(&values).set_requires_grad(true)),
            Bigram::frozen(),
            reward_fn(|_, response| score_of(response)),
        )
        .unwrap()
        .with_detokenizer(letters);
        let rollout = trainer.evaluate(written()).unwrap();
        let close = |what: &str, got: &Tensor, row: usize, want: &[f64]| {
            for (t, want) in want.iter().enumerate() {
                let got = got.double_value(&[row as i64, t as i64]);
                assert!(
                    (got - want).abs() < 2e-5,
                    "{what} {row} {t}: {got} is not {want}"
                );
            }
            let rest =
                got.get(row as i64)
                    .narrow(0, want.len() as i64, got.size()[1] - want.len() as i64);
            assert_eq!(
                f64::try_from(rest.abs().sum(Kind::Double)).unwrap(),
                0.0,
                "{what}"
            );
        };
        let episodes = self.episodes();
        for (row, episode) in episodes.iter().enumerate() {
            close("reward", &rollout.rewards, row, &episode.rewards);
            close("return", &rollout.returns, row, &episode.returns);
            close(
                "advantage",
                &rollout.advantages,
                row,
                &episode.advantages[..episode.tokens],
            );
        }
        // The first losses: −mean A over tokens, ½ mean (V − R)² over steps.
        let out = trainer
            .update_minibatch(&rollout, &[0, 1, 2, 3])
            .unwrap()
            .unwrap();
        let tokens: usize = episodes.iter().map(|e| e.tokens).sum();
        let sum: f64 = episodes
            .iter()
            .flat_map(|e| &e.advantages[..e.tokens])
            .sum();
        assert!((out.policy_loss + sum / tokens as f64).abs() < 2e-5);
        let states = written().batch.into_sequences();
        let squares = episodes.iter().zip(&states).flat_map(|(e, s)| {
            let states: Vec<i64> = s.prompt.iter().chain(&s.response).copied().collect();
            let error =
                move |(t, r): (usize, &f64)| (value_table()[states[t] as usize] - r).powi(2);
            e.returns.iter().enumerate().map(error).collect::<Vec<_>>()
        });
        let squares: Vec<f64> = squares.collect();
        let want = 0.5 * squares.iter().sum::<f64>() / squares.len() as f64;
        assert!(
            (out.value_loss - want).abs() < 1e-4 * want.max(1.0),
            "{} is not {want}",
            out.value_loss
        );
    }
}

const NONE: f64 = f64::INFINITY;

#[test]
fn n_plus() {
    Reference {
        temperature: 0.7,
        kl_coef: 0.05,
        clip_score: NONE,
        missing_eos: Some(-1.0),
        one_past_the_end: true,
        clip_reward: NONE,
        lam: 0.95,
        whitening: Some((0.0, false)),
    }
    .check(PpoConfig::n_plus());
}

#[test]
fn trl() {
    Reference {
        temperature: 0.7,
        kl_coef: 0.05,
        clip_score: NONE,
        missing_eos: None,
        one_past_the_end: true,
        clip_reward: NONE,
        lam: 0.95,
        whitening: Some((1.0, false)),
    }
    .check(PpoConfig::trl());
}

#[test]
fn openrlhf() {
    Reference {
        temperature: 1.0,
        kl_coef: 0.01,
        clip_score: 10.0,
        missing_eos: None,
        one_past_the_end: false,
        clip_reward: NONE,
        lam: 1.0,
        whitening: Some((0.0, true)),
    }
    .check(PpoConfig::openrlhf());
}

#[test]
fn deepspeed_chat() {
    let reference = Reference {
        temperature: 1.0,
        kl_coef: 0.1,
        clip_score: 5.0,
        missing_eos: None,
        one_past_the_end: false,
        clip_reward: NONE,
        lam: 0.95,
        whitening: None,
    };
    let mut config = PpoConfig::deepspeed_chat();
    config.generation.sampling.temperature = 0.5; // divides no log-probability
    reference.check(config);
}

#[test]
fn safe_rlhf() {
    Reference {
        temperature: 1.0,
        kl_coef: 0.02,
        clip_score: NONE,
        missing_eos: None,
        one_past_the_end: false,
        clip_reward: 50.0,
        lam: 0.95,
        whitening: None,
    }
    .check(PpoConfig::safe_rlhf());
}

/// What no number above shows.
#[test]
fn optimisers_and_clip_ranges() {
    let rates = |c: &PpoConfig| {
        (
            c.update.optimizer.lr,
            c.critic_lr,
            c.update.optimizer.beta2,
            c.update.optimizer.eps,
        )
    };
    assert_eq!(rates(&PpoConfig::n_plus()), (3e-6, None, 0.999, 1e-5));
    assert_eq!(rates(&PpoConfig::trl()), (3e-6, None, 0.999, 1e-8));
    assert_eq!(
        rates(&PpoConfig::openrlhf()),
        (1e-6, Some(9e-6), 0.95, 1e-8)
    );
    assert_eq!(
        rates(&PpoConfig::deepspeed_chat()),
        (9.65e-6, Some(5e-6), 0.95, 1e-8)
    );
    assert_eq!(
        rates(&PpoConfig::safe_rlhf()),
        (1e-5, Some(5e-6), 0.95, 1e-8)
    );
    for config in [PpoConfig::n_plus(), PpoConfig::trl()] {
        assert_eq!((config.vf_coef, config.update.max_grad_norm), (0.1, None));
    }
    for config in [
        PpoConfig::openrlhf(),
        PpoConfig::deepspeed_chat(),
        PpoConfig::safe_rlhf(),
    ] {
        assert_eq!(
            (config.vf_coef, config.update.max_grad_norm),
            (1.0, Some(1.0))
        );
    }
    let ranges = |c: &PpoConfig| (c.cliprange, c.cliprange_value);
    assert_eq!(ranges(&PpoConfig::safe_rlhf()), (0.2, 5.0));
    assert_eq!(ranges(&PpoConfig::openrlhf()), (0.2, 0.2));
    let ptx = PtxConfig::deepspeed_chat();
    assert_eq!((ptx.coef, ptx.step), (27.8, PtxStep::Separate));
    assert_eq!(
        PpoConfig::n_plus().kl_control,
        KlControl::Fixed { kl_coef: 0.05 }
    );
}
