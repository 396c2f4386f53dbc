//! What is refused, and changes nothing.

use super::*;

#[test]
fn a_score_that_is_not_a_number_names_its_answer_and_changes_nothing() {
    struct Nan;
    impl RewardModel for Nan {
        fn score(&self, completions: &Completions) -> Result<Tensor> {
            let mut scores = vec![0.0; completions.batch.len()];
            scores[2] = f64::NAN;
            Ok(Tensor::from_slice(&scores))
        }
    }
    let mut broken = trainer_with(sized(GrpoConfig::trl()), Nan);
    let before = weights(&broken);
    let error = broken.step(&prompts()[..4]).unwrap_err();
    assert!(
        matches!(error, Error::Core(CoreError::NonFinite { row: 2, .. })),
        "{error}"
    );
    assert_eq!(weights(&broken), before);
    assert_eq!(broken.steps_done(), 0);

    // The step that failed used up no random numbers either.
    let dir = tempfile::tempdir().unwrap();
    broken.save(dir.path()).unwrap();
    let mut resumed = trainer(sized(GrpoConfig::trl()));
    resumed.load(dir.path()).unwrap();
    resumed.train(&prompts(), 2, &mut []).unwrap();
    let mut fresh = trainer(sized(GrpoConfig::trl()));
    fresh.train(&prompts(), 2, &mut []).unwrap();
    assert_eq!(weights(&resumed), weights(&fresh));
}

#[test]
fn broken_groups_and_a_missing_reference_are_errors() {
    let trainer = trainer(sized(GrpoConfig::trl()));
    let shuffled = written().select(&[0, 4, 1, 2]).unwrap();
    let error = trainer.evaluate(shuffled).unwrap_err();
    assert!(matches!(
        error,
        Error::BrokenGroup {
            row: 0,
            group_size: 4
        }
    ));
    let short = written().select(&[0, 1, 2, 3, 4]).unwrap();
    let error = trainer.evaluate(short).unwrap_err();
    assert!(matches!(error, Error::BrokenGroup { row: 4, .. }));

    let reward = reward_fn(|_, _| 0.0);
    let Err(error) = GrpoTrainer::new(sized(GrpoConfig::grpo()), Bigram::new(), reward) else {
        panic!("a penalty without a reference");
    };
    assert!(error.to_string().contains("with_reference"), "{error}");
    let free = GrpoConfig {
        kl: KlPenalty::None,
        ..sized(GrpoConfig::grpo())
    };
    let reward = reward_fn(|_, answer| answer.len() as f64);
    let mut trainer = GrpoTrainer::new(free, Bigram::new(), reward)
        .unwrap()
        .with_detokenizer(letters);
    let stats = trainer.step(&prompts()[..4]).unwrap();
    assert_eq!(stats.get("grpo/kl"), None);
}
