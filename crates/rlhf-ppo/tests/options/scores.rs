//! What becomes of a score.

use super::*;

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
