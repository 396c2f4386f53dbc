//! The KL as a loss, clamped, and as a guard.

use super::*;

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
