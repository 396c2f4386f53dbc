//! How a rollout becomes steps of the optimiser.

use super::*;

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
