//! What the options change.

use super::*;

#[test]
fn one_step_needs_no_log_probabilities_before_it() {
    let run = |old_logprobs| {
        let mut config = sized(GrpoConfig::grpo());
        (config.num_iterations, config.minibatches) = (1, 1);
        config.old_logprobs = old_logprobs;
        let mut trainer = trainer(config);
        let rollout = trainer.rollout(&prompts()).unwrap();
        let known = rollout.old_logprobs.is_some();
        let stats = trainer.update(&rollout).unwrap();
        (known, stats, weights(&trainer))
    };
    let (known, stats, lazy) = run(OldLogprobs::Recomputed);
    assert!(!known);
    assert!((stats.get("grpo/policy/ratio").unwrap() - 1.0).abs() < 1e-6);
    assert!(stats.get("grpo/mismatch/max").unwrap() < 1e-5);
    let (known, _, sampled) = run(OldLogprobs::Sampled);
    assert!(known);
    for (a, b) in lazy.iter().zip(&sampled) {
        assert!((a - b).abs() < 1e-4, "{a} is not {b}");
    }
}

#[test]
fn what_filters_left_is_replayed() {
    let mut config = sized(GrpoConfig::grpo());
    config.generation.sampling.top_k = Some(3);
    config.generation.min_new_tokens = 2;
    // Several rounds are joined.
    config.dynamic_sampling = Some(DynamicSampling { max_rounds: 6 });
    let mut observers: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| {
        // The sampler's log-probabilities are the trainer's, within the kept sets.
        let gap = event.stats.get("grpo/mismatch/max").unwrap();
        assert!(gap < 1e-5, "{gap}");
        Ok(ControlFlow::Continue(()))
    })];
    trainer(config)
        .train(&prompts(), 4, &mut observers)
        .unwrap();
}

#[test]
fn prompts_without_differing_answers_are_dropped_and_others_sampled() {
    // Only prompts that begin with 2 have answers that differ in score.
    let reward = || {
        reward_fn(|prompt, answer| match prompt.starts_with('c') {
            true => answer.matches('c').count() as f64,
            false => 1.0,
        })
    };
    let mut config = sized(GrpoConfig::trl());
    config.batch_size = 4;
    config.dynamic_sampling = Some(DynamicSampling { max_rounds: 20 });
    let mut seen = Vec::new();
    let mut observers: Vec<Box<dyn Observer + '_>> = vec![Box::new(|event: &Event<'_>| {
        seen.push(event.stats.clone());
        Ok(ControlFlow::Continue(()))
    })];
    let mut full = trainer_with(config.clone(), reward());
    full.train(&prompts(), 3, &mut observers).unwrap();
    drop(observers);
    for stats in &seen {
        assert_eq!(stats.get("grpo/samples"), Some(16.0));
        assert_eq!(stats.get("grpo/groups/zero_std"), Some(0.0));
        let [sampled, dropped] =
            ["sampled", "dropped"].map(|name| stats.get(&format!("grpo/groups/{name}")).unwrap());
        assert!(
            sampled - dropped >= 4.0 && dropped > 0.0,
            "{sampled}, {dropped}"
        );
        assert!(stats.get("grpo/groups/rounds").unwrap() > 1.0);
    }
    // Where no prompt has them, nothing is learnt, and no failure is made of it.
    config.dynamic_sampling = Some(DynamicSampling { max_rounds: 3 });
    let mut none = trainer_with(config, reward_fn(|_, _| 1.0));
    let before = weights(&none);
    let stats = none.step(&prompts()[..4]).unwrap();
    assert_eq!(stats.get("grpo/update_skipped"), Some(1.0));
    assert_eq!(stats.get("grpo/samples_used"), Some(0.0));
    assert_all_finite(&stats);
    assert_eq!(weights(&none), before);
    assert!(none.step(&[]).is_err());
}

#[test]
fn cut_answers_count_in_the_baseline_and_not_in_the_loss() {
    let with = |truncated| {
        let config = GrpoConfig {
            truncated,
            ..sized(GrpoConfig::trl())
        };
        trainer(config).evaluate(written()).unwrap()
    };
    let (learnt, masked) = (with(Truncated::Learn), with(Truncated::Mask));
    assert_eq!(learnt.advantages, masked.advantages);
    assert_eq!(learnt.tokens() - masked.tokens(), 6.0);
    assert_eq!(
        masked.used,
        [true, true, true, true, true, true, true, false]
    );
    assert_eq!(masked.used_rows(&[1]), [4, 5, 6]);
}

#[test]
fn several_rewards_are_mixed_as_trl_does() {
    struct Column(Vec<f64>);
    impl RewardModel for Column {
        fn score(&self, _: &Completions) -> Result<Tensor> {
            Ok(Tensor::from_slice(&self.0))
        }
    }
    let golden = Golden::load("grpo/advantages");
    let batch = (0..12)
        .map(|i| Sequence::new([1 + i / 4], [2, STOP]))
        .collect();
    let completions = Completions::written(SequenceBatch::new(batch).unwrap());
    for name in ["two_rewards_normalize_then_sum", "missing_rewards_group"] {
        let run: &Value = &golden.json["params"]["runs"][name];
        let rows: Vec<Vec<Option<f64>>> = serde_json::from_value(run["rewards"].clone()).unwrap();
        let column = |i: usize| Column(rows.iter().map(|row| row[i].unwrap_or(f64::NAN)).collect());
        let mix = match name {
            "missing_rewards_group" => RewardMix::Sum,
            _ => RewardMix::NormalizeThenSum,
        };
        let config = GrpoConfig {
            mix,
            unscored: Unscored::LeaveOut,
            ..sized(GrpoConfig::trl())
        };
        let mut trainer = trainer_with(config, column(0))
            .with_reward("second", 0.5, column(1))
            .unwrap();
        let rollout = trainer.evaluate(completions.clone()).unwrap();
        let got = Tensor::from_slice(&rollout.advantages);
        let want = golden.tensor(&format!("{name}/advantages"));
        assert_close(name, &got, &want, 1e-5, 0.0);
        let used = rows.iter().map(|row| row.iter().any(Option::is_some));
        assert_eq!(rollout.used, used.collect::<Vec<_>>());
        let stats = trainer.update(&rollout).unwrap();
        assert!(stats.get("grpo/score/second").is_some());
        assert_all_finite(&stats);
    }
}

#[test]
fn importance_weights_correct_for_another_sampler() {
    let with = |off_policy| {
        let mut config = sized(GrpoConfig::trl());
        (config.num_iterations, config.minibatches) = (1, 1);
        config.off_policy = off_policy;
        let mut completions = written();
        let sequences = completions.batch.sequences();
        // As if they had come from a uniform distribution.
        let uniform = (0.2f32).ln();
        let said = sequences.iter().map(|s| vec![uniform; s.response.len()]);
        completions.sampling_logprobs = Some(said.collect());
        let mut trainer = trainer(config);
        let rollout = trainer.evaluate(completions).unwrap();
        let stats = trainer.update(&rollout).unwrap();
        (stats, weights(&trainer))
    };
    let (plain, uncorrected) = with(OffPolicy::Ignore);
    assert_eq!(plain.get("grpo/mismatch/weight"), Some(1.0));
    assert!(plain.get("grpo/mismatch/mean").unwrap() > 0.1);
    let tokens = OffPolicy::Tokens {
        cap: 2.0,
        excess: Excess::Truncate,
    };
    let (stats, corrected) = with(tokens);
    let weight = stats.get("grpo/mismatch/weight").unwrap();
    assert!(weight > 0.0 && weight < 2.0 && weight != 1.0, "{weight}");
    assert_ne!(uncorrected, corrected);
}
