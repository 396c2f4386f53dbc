//! Each option on models that are small enough to see through.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::bigram::{Bigram, STOP, TokenValue, VOCABULARY, letters};
use proptest::prelude::*;
use rlhf_ppo::core::{
    Completions, FinishReason, LogprobOptions, Policy, Sequence, SequenceBatch, Stats, reward_fn,
};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{
    Error, Guarded, KlControl, KlEstimator, KlGuard, KlPlacement, LengthPenalty, MinibatchUnit,
    MissingEos, OldLogprobs, OnKl, PpoConfig, PpoTrainer, PtxConfig, PtxStep, RolloutCorrection,
    ScoreScaling,
};

type Trainer = PpoTrainer<Bigram, TokenValue>;

fn config() -> PpoConfig {
    let mut config = PpoConfig {
        seed: 11,
        batch_size: 16,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 3,
        missing_eos: MissingEos::Keep,
        kl_control: KlControl::Fixed { kl_coef: 0.1 },
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.05;
    config
}

fn trainer_of(config: PpoConfig, policy: Bigram) -> Trainer {
    let count = |text: &str| text.matches('c').count() as f64;
    let reward = reward_fn(move |_, response| count(response));
    PpoTrainer::new(config, policy, TokenValue::new(), Bigram::frozen(), reward)
        .unwrap()
        .with_detokenizer(letters)
}

fn trainer(config: PpoConfig) -> Trainer {
    trainer_of(config, Bigram::new())
}

/// A policy that has moved away from the reference already.
fn moved() -> Bigram {
    let table = Bigram::new().0.detach();
    let away = Tensor::arange(VOCABULARY * VOCABULARY, (Kind::Float, table.device()));
    Bigram((table + away.cos().view([VOCABULARY, VOCABULARY]) * 0.5).set_requires_grad(true))
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..16).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

/// `c` is 2; responses of three, two, two and three tokens, the last unfinished.
fn written() -> Completions {
    let batch = SequenceBatch::new(vec![
        Sequence::new([1], [2, 3, STOP]),
        Sequence::new([2], [4, STOP]),
        Sequence::new([3], [2, STOP]),
        Sequence::new([4], [2, 2, 1]),
    ])
    .unwrap();
    let mut completions = Completions::written(batch);
    completions.finish_reasons[3] = FinishReason::Length;
    completions
}

fn weights(trainer: &Trainer) -> Vec<f32> {
    let flat = |t: &Tensor| Vec::<f32>::try_from(t.detach().view(-1)).unwrap();
    [flat(&trainer.policy().0), flat(&trainer.value_model().0)].concat()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

#[track_caller]
fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= tolerance, "{got:?} is not {want:?}");
    }
}

fn stat(stats: &Stats, name: &str) -> f64 {
    stats
        .get(name)
        .unwrap_or_else(|| panic!("{name} is missing"))
}

/// What filters kept is stored, and all log-probabilities are those within it: the sampler's are
/// the trainer's, the first ratios are 1, and later ones are those of the narrowed distributions.
#[test]
fn filters_are_replayed() {
    for old_logprobs in [OldLogprobs::Recomputed, OldLogprobs::Sampled] {
        let mut config = PpoConfig {
            old_logprobs,
            minibatches: 1,
            ppo_epochs: 1,
            ..config()
        };
        config.generation.sampling.top_k = Some(3);
        config.generation.sampling.top_p = Some(0.8);
        config.generation.sampling.min_p = Some(0.1);
        config.generation.min_new_tokens = 2;
        let temperature = config.temperature();
        let mut trainer = trainer(config);
        let rollout = trainer.rollout(&prompts()).unwrap();
        let kept = rollout.completions.kept.clone().unwrap();
        let sampled = rollout.completions.sampling_logprobs.as_ref().unwrap();
        for (row, sampled) in sampled.iter().enumerate() {
            assert_eq!(kept[row].len(), sampled.len());
            assert!(!kept[row][0].contains(STOP), "min_new_tokens bans it");
            for (t, sampled) in sampled.iter().enumerate() {
                let got = rollout.logprobs.double_value(&[row as i64, t as i64]);
                assert!((got - f64::from(*sampled)).abs() < 1e-5);
            }
        }
        // Within the kept set, from the table itself.
        let row = &rollout.completions.batch.sequences()[3];
        let within = |table: &Tensor, t: usize| {
            let from = if t == 0 {
                row.prompt[1]
            } else {
                row.response[t - 1]
            };
            let logits = numbers(&(table.detach().get(from) / temperature));
            let set = &kept[3][t];
            let left = (0..VOCABULARY).filter(|&id| set.contains(id));
            let sum: f64 = left.map(|id| logits[id as usize].exp()).sum();
            logits[row.response[t] as usize] - sum.ln()
        };
        let old: Vec<f64> = (0..row.response.len())
            .map(|t| within(&trainer.policy().0, t))
            .collect();
        let got: Vec<f64> = numbers(&rollout.logprobs.get(3))[..old.len()].to_vec();
        assert_close(&got, &old, 1e-5);

        let first = trainer.update_minibatch(&rollout, &[3]).unwrap().unwrap();
        assert!((first.ratio - 1.0).abs() < 1e-5, "{}", first.ratio);
        let ratios: Vec<f64> = (0..old.len())
            .map(|t| (within(&trainer.policy().0, t) - old[t]).exp())
            .collect();
        let want = ratios.iter().sum::<f64>() / ratios.len() as f64;
        let second = trainer.update_minibatch(&rollout, &[3]).unwrap().unwrap();
        assert!(
            (second.ratio - want).abs() < 1e-5,
            "{} {want}",
            second.ratio
        );
        assert!((want - 1.0).abs() > 1e-3, "nothing has moved");
    }
}

#[test]
fn without_a_filter_nothing_is_stored() {
    let rollout = trainer(config()).rollout(&prompts()).unwrap();
    assert!(rollout.completions.kept.is_none());
    assert!(rollout.mismatch.unwrap().max < 1e-5);
}

/// As part of the loss, the KL is a token mean between the policy and the reference, and its
/// gradient leads back to the reference where there is nothing else to learn.
#[test]
fn kl_as_a_loss() {
    let run = |estimator, placement| {
        let mut config = PpoConfig {
            kl_estimator: estimator,
            kl_placement: placement,
            minibatches: 1,
            vf_coef: 0.0,
            gamma: 0.0,
            lam: 0.0,
            whiten_advantages: rlhf_ppo::Whitening::Off,
            kl_control: KlControl::Fixed { kl_coef: 0.5 },
            ..config()
        };
        config.update.optimizer.lr = 0.02;
        let nothing = reward_fn(|_, _| 0.0);
        let critic = TokenValue::new();
        PpoTrainer::new(config, moved(), critic, Bigram::frozen(), nothing)
            .unwrap()
            .with_detokenizer(letters)
    };
    for estimator in [
        KlEstimator::K2,
        KlEstimator::K3,
        KlEstimator::K1Plus,
        KlEstimator::K3Plus,
    ] {
        let mut trainer = run(estimator, KlPlacement::Loss);
        let rollout = trainer.evaluate(written()).unwrap();
        assert_eq!(numbers(&rollout.rewards.abs().sum(Kind::Double)), [0.0]);
        let kl = estimator.estimate(&rollout.logprobs, &rollout.ref_logprobs);
        let want = kl.sum(Kind::Double).double_value(&[]) / 10.0;
        let rows = [0, 1, 2, 3];
        let out = trainer.update_minibatch(&rollout, &rows).unwrap().unwrap();
        assert!((out.kl_loss - want).abs() < 1e-6);
        assert!((out.loss - out.policy_loss - 0.5 * want).abs() < 1e-6);

        let kl = |trainer: &mut Trainer| {
            let rollout = trainer.rollout(&prompts()).unwrap();
            let k3 = KlEstimator::K3.estimate(&rollout.logprobs, &rollout.ref_logprobs);
            k3.sum(Kind::Double).double_value(&[])
        };
        let before = kl(&mut trainer);
        for _ in 0..40 {
            trainer.step(&prompts()).unwrap();
        }
        let after = kl(&mut trainer);
        assert!(after < 0.4 * before, "{estimator:?}: {before} {after}");
    }
    // In the reward the same estimate is a price of every token.
    let rollout = run(KlEstimator::K3Plus, KlPlacement::Reward)
        .evaluate(written())
        .unwrap();
    let want = numbers(&(&rollout.kl * -0.5));
    let got = numbers(&rollout.rewards.narrow(1, 0, 3));
    assert_close(&got, &want, 1e-7);
}

#[test]
fn estimates_of_the_kl_are_clamped() {
    let far = Bigram((Bigram::new().0.detach() * 30.0).set_requires_grad(true));
    let clamped = PpoConfig {
        kl_estimator: KlEstimator::K3,
        kl_clamp: Some(2.5),
        ..config()
    };
    let rollout = trainer_of(clamped, far).evaluate(written()).unwrap();
    assert_eq!(f64::try_from(rollout.kl.max()).unwrap(), 2.5);
}

fn kl_guard(limit: f64, action: OnKl) -> PpoConfig {
    let mut config = PpoConfig {
        minibatches: 1,
        ppo_epochs: 4,
        ..config()
    };
    config.guards.kl = Some(KlGuard {
        limit,
        estimator: KlEstimator::K3,
        action,
    });
    config
}

/// The first step begins at the rollout's policy; after it every step is too far.
#[test]
fn steps_are_skipped_or_the_update_ends_where_the_policy_is_too_far() {
    let mut one_step = trainer(PpoConfig {
        ppo_epochs: 1,
        ..kl_guard(1e9, OnKl::SkipStep)
    });
    let rollout = one_step.evaluate(written()).unwrap();
    let stats = one_step.update(&rollout).unwrap();
    assert_eq!(stat(&stats, "ppo/guard/kl"), 0.0);
    for (action, share, ended) in [(OnKl::SkipStep, 0.75, 0.0), (OnKl::EndUpdate, 0.5, 1.0)] {
        let mut guarded = trainer(kl_guard(1e-7, action));
        let rollout = guarded.evaluate(written()).unwrap();
        let stats = guarded.update(&rollout).unwrap();
        assert_eq!(stat(&stats, "ppo/guard/kl"), share);
        assert_eq!(stat(&stats, "ppo/guard/ended"), ended);
        assert_eq!(weights(&guarded), weights(&one_step));
        assert_eq!(guarded.updater().step(), 1);
        assert!(stat(&stats, "ppo/grad_norm").is_finite());
    }
    // What it looks at is the divergence of the old policy from the new, per token.
    let mut guarded = trainer(kl_guard(1e9, OnKl::EndUpdate));
    let rollout = guarded.evaluate(written()).unwrap();
    let rows = [0, 1, 2, 3];
    guarded.update_minibatch(&rollout, &rows).unwrap();
    let options = LogprobOptions {
        temperature: 0.7,
        entropy: false,
    };
    let new = guarded
        .policy()
        .logprobs(&rollout.completions.batch, &options)
        .unwrap();
    let kl = KlEstimator::K3.estimate(&rollout.logprobs, &new.logprobs.detach());
    let kl = kl.sum(Kind::Double).double_value(&[]) / 10.0;
    for (limit, expected) in [(kl * 1.01, None), (kl * 0.99, Some(Guarded::Kl))] {
        let mut again = trainer(kl_guard(limit, OnKl::EndUpdate));
        let first = again.update_minibatch(&rollout, &rows).unwrap().unwrap();
        assert_eq!(first.guarded, None);
        let second = again.update_minibatch(&rollout, &rows).unwrap().unwrap();
        assert_eq!(second.guarded, expected, "limit {limit}");
    }
}

#[test]
fn a_batch_whose_ratios_are_out_of_hand_is_skipped() {
    let mut config = config();
    config.guards.max_mean_ratio = Some(10.0);
    let mut trainer = trainer(config);
    let before = weights(&trainer);
    let mut rollout = trainer.evaluate(written()).unwrap();
    rollout.logprobs -= 3.0; // e³ = 20
    let stats = trainer.update(&rollout).unwrap();
    assert_eq!(stat(&stats, "ppo/guard/ratio"), 1.0);
    assert_eq!(weights(&trainer), before);
    assert!((stat(&stats, "ppo/policy/ratio") - 3f64.exp()).abs() < 1e-3);
    rollout.logprobs += 1.0; // e² = 7
    let stats = trainer.update(&rollout).unwrap();
    assert_eq!(stat(&stats, "ppo/guard/ratio"), 0.0);
    assert_ne!(weights(&trainer), before);
}

/// Counts of `c`: 1, 0, 1, 2; mean 1, deviation with n − 1: √(2/3).
#[test]
fn scores_are_scaled_by_what_was_seen() {
    let run = |score_scaling, score_clip| {
        let mut trainer = trainer(PpoConfig {
            score_scaling,
            score_clip,
            ..config()
        });
        let first = trainer.evaluate(written()).unwrap();
        let again = trainer.evaluate(written()).unwrap();
        assert_eq!(numbers(&first.final_scores), numbers(&again.final_scores));
        trainer.update(&first).unwrap();
        let second = trainer.evaluate(written()).unwrap();
        (numbers(&first.final_scores), numbers(&second.final_scores))
    };
    let of = |deviation: f64, shift: f64| [1.0, 0.0, 1.0, 2.0].map(|x| (x - shift) / deviation);
    let (first, second) = ((2f64 / 3.0).sqrt(), (4f64 / 7.0).sqrt());
    let (a, b) = run(ScoreScaling::Divide, None);
    assert_close(&a, &of(first, 0.0), 1e-6);
    assert_close(&b, &of(second, 0.0), 1e-6); // eight scores by then
    let (a, b) = run(ScoreScaling::Standardize, None);
    assert_close(&a, &of(first, 1.0), 1e-6);
    assert_close(&b, &of(second, 1.0), 1e-6);
    let (a, _) = run(ScoreScaling::Standardize, Some(0.5));
    assert_close(&a, &[0.0, -0.5, 0.0, 0.5], 1e-6);
    let (a, b) = run(ScoreScaling::Off, None);
    assert_close(&a, &[1.0, 0.0, 1.0, 2.0], 0.0);
    assert_close(&b, &a, 0.0);
}

/// Scaling, clipping, the missing EOS, then the length.
#[test]
fn the_order_of_what_becomes_of_a_score() {
    let trainer = trainer(PpoConfig {
        score_clip: Some(1.5),
        missing_eos: MissingEos::Subtract(0.25),
        length_penalty: Some(LengthPenalty::PerToken { coef: 0.1, free: 2 }),
        ..config()
    });
    let rollout = trainer.evaluate(written()).unwrap();
    let want = [1.0 - 0.1, 0.0, 1.0, 1.5 - 0.25 - 0.1];
    assert_close(&numbers(&rollout.final_scores), &want, 1e-6);
    assert_close(&numbers(&rollout.scores), &[1.0, 0.0, 1.0, 2.0], 0.0);
}

#[test]
fn the_reward_of_a_step_is_clipped() {
    let trainer = trainer(PpoConfig {
        reward_clip: Some(1.25),
        ..config()
    });
    let rollout = trainer.evaluate(written()).unwrap();
    let most = f64::try_from(rollout.rewards.max()).unwrap();
    assert_eq!(most, 1.25); // of 2
}

/// Texts in which `e` (4) follows `e`.
fn texts() -> Vec<Sequence> {
    (0..5).map(|_| Sequence::new([4], [4, 4, 4])).collect()
}

fn with_ptx(step: PtxStep) -> Trainer {
    let config = PpoConfig {
        minibatches: 1,
        microbatch_size: 2,
        ptx: Some(PtxConfig {
            coef: 2.0,
            batch_size: 3,
            step,
        }),
        ..config()
    };
    trainer(config).with_pretraining(texts()).unwrap()
}

#[test]
fn pretraining_is_mixed_in() {
    let rows = [0, 1, 2, 3];
    let mut plain = trainer(config());
    let rollout = plain.evaluate(written()).unwrap();
    let before = plain
        .policy()
        .0
        .detach()
        .get(4)
        .log_softmax(-1, Kind::Float);
    let cross_entropy = -before.double_value(&[4]);
    let alone = plain.update_minibatch(&rollout, &rows).unwrap().unwrap();
    assert_eq!(alone.ptx_loss, None);

    let mut joint = with_ptx(PtxStep::Joint);
    let out = joint.update_minibatch(&rollout, &rows).unwrap().unwrap();
    assert!((out.ptx_loss.unwrap() - cross_entropy).abs() < 1e-6);
    assert!((out.loss - alone.loss - 2.0 * cross_entropy).abs() < 1e-5);
    assert_eq!(joint.updater().step(), 1);

    let mut separate = with_ptx(PtxStep::Separate);
    let out = separate.update_minibatch(&rollout, &rows).unwrap().unwrap();
    assert!((out.loss - alone.loss).abs() < 1e-6);
    // Its step comes after PPO's, which has moved the table.
    assert!((out.ptx_loss.unwrap() - cross_entropy).abs() < 0.1);
    assert_eq!(separate.updater().step(), 2);

    for mut trainer in [joint, separate] {
        let stats = (0..30)
            .map(|_| trainer.step(&prompts()).unwrap())
            .last()
            .unwrap();
        let after = stat(&stats, "ppo/ptx/loss");
        assert!(
            after < 0.5 * cross_entropy,
            "{cross_entropy} became {after}"
        );
    }
    let mut without_texts = trainer(PpoConfig {
        ptx: Some(PtxConfig::default()),
        ..config()
    });
    let error = without_texts.update(&rollout).unwrap_err().to_string();
    assert!(error.contains("with_pretraining"), "{error}");
    let empty = trainer(config()).with_pretraining(vec![Sequence::new([1], [])]);
    assert!(empty.is_err());
}

#[test]
fn an_entropy_bonus_flattens_the_distribution() {
    let run = |entropy_coef| {
        let mut config = PpoConfig {
            entropy_coef,
            ..config()
        };
        config.update.optimizer.lr = 0.02;
        let mut trainer = trainer(config);
        let stats = (0..15).map(|_| trainer.step(&prompts()).unwrap()).last();
        stat(&stats.unwrap(), "ppo/policy/entropy")
    };
    let (without, with) = (run(0.0), run(0.3));
    assert!(with > without + 0.1, "{without} became {with}");
}

/// A sampler that was off: tokens that it over-sampled count less, the others more, up to the cap.
#[test]
fn truncated_importance_corrects_a_sampler_that_was_off() {
    let corrected = PpoConfig {
        rollout_correction: RolloutCorrection::TruncatedImportance { cap: 1.5 },
        whiten_advantages: rlhf_ppo::Whitening::Off,
        ..config()
    };
    let mut trainer = trainer(corrected);
    let mut completions = written();
    let exact = trainer.evaluate(completions.clone()).unwrap();
    assert!(exact.mismatch.is_none() && exact.weights.is_none());
    let lengths = [3usize, 2, 2, 3];
    let off = [0.1f32, -0.1, 0.5, -0.5];
    let sampled = lengths.iter().zip(off).enumerate().map(|(row, (&n, off))| {
        let own = numbers(&exact.logprobs.get(row as i64));
        own[..n].iter().map(|x| *x as f32 - off).collect()
    });
    completions.sampling_logprobs = Some(sampled.collect());
    let rollout = trainer.evaluate(completions).unwrap();
    let mismatch = rollout.mismatch.unwrap();
    let mean = (0.1 * 5.0 + 0.5 * 5.0) / 10.0;
    assert!((mismatch.mean - mean).abs() < 1e-6 && (mismatch.max - 0.5).abs() < 1e-6);
    let weights = rollout.weights.as_ref().unwrap();
    for (row, want) in [0.1f64.exp(), (-0.1f64).exp(), 1.5, (-0.5f64).exp()]
        .iter()
        .enumerate()
    {
        assert!((weights.double_value(&[row as i64, 0]) - want).abs() < 1e-6);
    }
    // The first loss is −Σ w A / tokens.
    let inside = |t: &Tensor| numbers(&(t * &rollout.advantages).sum(Kind::Double))[0];
    let out = trainer
        .update_minibatch(&rollout, &[0, 1, 2, 3])
        .unwrap()
        .unwrap();
    assert!((out.policy_loss + inside(weights) / 10.0).abs() < 1e-6);
    assert!((out.ratio - 1.0).abs() < 1e-6);
    let stats = trainer.update(&rollout).unwrap();
    assert!((stat(&stats, "ppo/mismatch/mean") - mean).abs() < 1e-6);
    assert!(stats.get("ppo/mismatch/weight").is_some());
}

/// One sample has more tokens as the others together.
#[test]
fn minibatches_by_tokens() {
    let run = |seed, minibatch_unit| {
        let mut trainer = trainer(PpoConfig {
            seed,
            minibatch_unit,
            minibatches: 2,
            ppo_epochs: 1,
            ..config()
        });
        let respond = |n: usize| Sequence::new([1], vec![2; n]);
        let batch = SequenceBatch::new([1, 2, 1, 9, 1, 2].map(respond).into()).unwrap();
        let rollout = trainer.evaluate(Completions::written(batch)).unwrap();
        trainer.update(&rollout).unwrap();
        weights(&trainer)
    };
    // Where the long one is in the middle of an epoch's order, both cut alike.
    let differ = |seed| run(seed, MinibatchUnit::Tokens) != run(seed, MinibatchUnit::Samples);
    assert!((0..6).filter(|&seed| differ(seed)).count() >= 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However a minibatch is split into microbatches, by sequences or by tokens, the update is
    /// the same to 1e-5 of its length. Adam's epsilon is large here, so that a step is
    /// proportional to the gradient: with a small one Adam turns the rounding of a gradient that
    /// is zero into a step of full length, whatever the split.
    #[test]
    fn the_split_does_not_change_the_update(
        lengths in proptest::collection::vec(0usize..7, 2..12),
        sequences in 1usize..5,
        tokens in proptest::option::of(1usize..24),
        seed in 0u64..1000,
    ) {
        prop_assume!(lengths.iter().any(|&n| n > 0));
        let respond = |(row, &n): (usize, &usize)| {
            let token = |t: usize| (1 + (seed as usize + 3 * row + t * t) % 4) as i64;
            Sequence::new([1 + row as i64 % 4], (0..n).map(token).collect::<Vec<_>>())
        };
        let batch = SequenceBatch::new(lengths.iter().enumerate().map(respond).collect()).unwrap();
        let update = |microbatch_size, microbatch_tokens| {
            let mut config = PpoConfig {
                microbatch_size,
                microbatch_tokens,
                minibatches: 1,
                ppo_epochs: 2,
                dual_clip: Some(3.0),
                entropy_coef: 0.01,
                kl_placement: KlPlacement::Loss,
                kl_estimator: KlEstimator::K3Plus,
                ..config()
            };
            config.update.optimizer.eps = 1.0;
            let mut trainer = trainer_of(config, moved());
            let before = weights(&trainer);
            let rollout = trainer.evaluate(Completions::written(batch.clone())).unwrap();
            trainer.update(&rollout).unwrap();
            let after = weights(&trainer);
            after.iter().zip(before).map(|(a, b)| f64::from(a - b)).collect::<Vec<f64>>()
        };
        let (whole, split) = (update(64, None), update(sequences, tokens));
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let gap: Vec<f64> = whole.iter().zip(&split).map(|(a, b)| a - b).collect();
        prop_assert!(norm(&whole) > 1e-4);
        prop_assert!(norm(&gap) < 1e-5 * norm(&whole), "{} of {}", norm(&gap), norm(&whole));
    }
}

#[test]
fn the_critic_may_learn_at_a_rate_of_its_own() {
    let still = PpoConfig {
        critic_lr: Some(0.0),
        ..config()
    };
    let mut trainer = trainer(still);
    let table = trainer.policy().0.copy();
    trainer.step(&prompts()).unwrap();
    assert_eq!(
        numbers(&trainer.value_model().0),
        [0.0; VOCABULARY as usize]
    );
    assert_ne!(numbers(&trainer.policy().0), numbers(&table));
}

#[test]
fn a_checkpoint_of_other_texts_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut with = with_ptx(PtxStep::Joint);
    with.step(&prompts()).unwrap();
    with.save(dir.path()).unwrap();
    let mut without = trainer(with.config().clone());
    let error = without.load(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::ConfigMismatch { field, .. } if field == "pretraining texts"));
    let mut fewer = trainer(with.config().clone())
        .with_pretraining(texts()[1..].to_vec())
        .unwrap();
    assert!(fewer.load(dir.path()).is_err());
    let mut same = with_ptx(PtxStep::Joint);
    same.load(dir.path()).unwrap();
    with.step(&prompts()).unwrap();
    same.step(&prompts()).unwrap();
    assert_eq!(weights(&with), weights(&same));
}
