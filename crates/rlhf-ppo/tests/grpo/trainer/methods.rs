//! Every method on a task that can be learnt.

use super::*;

#[test]
fn the_score_rises_with_every_method_and_the_statistics_are_whole() {
    for (name, config) in methods() {
        let mut trainer = trainer(config);
        let mut seen: Vec<Stats> = Vec::new();
        let mut observers: Vec<Box<dyn Observer + '_>> = vec![Box::new(|event: &Event<'_>| {
            assert_eq!((event.phase, event.total_steps), ("grpo", Some(25)));
            seen.push(event.stats.clone());
            Ok(ControlFlow::Continue(()))
        })];
        trainer.train(&prompts(), 25, &mut observers).unwrap();
        drop(observers);
        seen.iter().for_each(assert_all_finite);
        let score = |s: &Stats| s.get("grpo/score/mean").unwrap();
        let mean = |s: &[Stats]| s.iter().map(score).sum::<f64>() / s.len() as f64;
        let (before, after) = (mean(&seen[..3]), mean(&seen[22..]));
        assert!(after > before + 0.8, "{name}: {before} became {after}");
        let kl = |s: &Stats| s.get("grpo/kl").unwrap();
        let (start, end) = (kl(&seen[0]), kl(&seen[24]));
        assert!(start.abs() < 1e-6 && end > 0.1, "{name}: {start}, {end}");
        for key in [
            "grpo/score/std",
            "grpo/score/length_correlation",
            "grpo/reward/mean",
            "grpo/reward/group_std",
            "grpo/groups/zero_std",
            "grpo/length",
            "grpo/finished",
            "grpo/distinct_2",
            "grpo/distinct_2_across",
            "grpo/policy/clipfrac",
            "grpo/policy/entropy",
            "grpo/policy/ratio_var",
            "grpo/mismatch/mean",
            "grpo/grad_norm",
            "grpo/lr",
            "grpo/time/rollout_s",
        ] {
            assert!(seen[24].get(key).is_some(), "{name}: {key} is missing");
        }
    }
}

#[test]
fn statistics_by_hand() {
    let mut config = sized(GrpoConfig::trl());
    config.length_penalty = Some(SOFT_OVERLONG);
    let mut trainer = trainer(config);
    let rollout = trainer.evaluate(written()).unwrap();
    assert_eq!(rollout.scores, [[1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 2.0, 3.0]]);
    // The last has all of its six tokens: the whole penalty.
    assert_eq!(rollout.rewards[7], 2.5);
    let stats = trainer.update(&rollout).unwrap();
    assert_all_finite(&stats);
    for (name, want) in [
        ("grpo/score/mean", 9.0 / 8.0),
        ("grpo/reward/mean", 8.5 / 8.0),
        ("grpo/length", 3.0),
        ("grpo/finished", 7.0 / 8.0),
        ("grpo/groups/zero_std", 0.0),
        ("grpo/samples", 8.0),
        ("grpo/samples_used", 8.0),
        ("grpo/lr", 0.05),
        ("grpo/update_skipped", 0.0),
    ] {
        let got = stats.get(name).unwrap();
        assert!((got - want).abs() < 1e-6, "{name} is {got}, not {want}");
    }
}
