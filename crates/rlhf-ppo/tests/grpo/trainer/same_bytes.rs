//! Seeds, splits and resumption.

use super::*;

#[test]
fn equal_seeds_give_equal_bytes_and_others_do_not() {
    for (name, config) in methods() {
        let run = |seed| {
            let mut trainer = trainer(GrpoConfig {
                seed,
                ..config.clone()
            });
            trainer.train(&prompts(), 3, &mut []).unwrap();
            weights(&trainer)
        };
        assert_eq!(run(1), run(1), "{name}");
        assert_ne!(run(1), run(2), "{name}");
    }
}

/// The update that these options make of a fixed batch.
fn update_of(mut config: GrpoConfig) -> Vec<f64> {
    // Adam's step is the gradient's sign where epsilon is small, and the sign of rounding noise
    // where the gradient is 0: a larger one makes the update a smooth function of the gradient.
    config.update.optimizer.eps = 1e-3;
    let mut trainer = trainer(config);
    let rollout = trainer.evaluate(written()).unwrap();
    trainer.update(&rollout).unwrap();
    let start = Vec::<f32>::try_from(Bigram::frozen().0.view(-1)).unwrap();
    let moved = weights(&trainer).into_iter().zip(start);
    moved.map(|(a, b)| f64::from(a) - f64::from(b)).collect()
}

#[test]
fn any_split_into_microbatches_makes_the_same_update() {
    let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (name, config) in methods() {
        let of = |microbatch_size| {
            update_of(GrpoConfig {
                microbatch_size,
                ..config.clone()
            })
        };
        let whole = of(64);
        assert!(length(&whole) > 1e-3, "{name} moved nothing");
        for size in 1..8 {
            let split = of(size);
            let gap: Vec<f64> = split.iter().zip(&whole).map(|(a, b)| a - b).collect();
            let relative = length(&gap) / length(&whole);
            assert!(
                relative < 1e-5,
                "{name} in microbatches of {size}: {relative}"
            );
        }
    }
}

#[test]
fn a_killed_run_ends_like_one_left_alone() {
    const STEPS: u64 = 5;
    for (name, config) in methods() {
        let mut alone = trainer(config.clone());
        alone.train(&prompts(), STEPS, &mut []).unwrap();
        for killed_at in 1..STEPS {
            let dir = tempfile::tempdir().unwrap();
            let checkpoints = CheckpointConfig {
                dir: dir.path().to_path_buf(),
                every: 2,
                keep: 2,
            };
            let mut first = trainer(config.clone());
            let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(move |event: &Event<'_>| {
                match event.step == killed_at {
                    true => Err(CoreError::config("killed", killed_at, "here")),
                    false => Ok(ControlFlow::Continue(())),
                }
            })];
            first
                .train_with_checkpoints(&prompts(), STEPS, &mut kill, &checkpoints)
                .unwrap_err();
            let mut second = trainer(config.clone());
            second
                .train_with_checkpoints(&prompts(), STEPS, &mut [], &checkpoints)
                .unwrap();
            assert_eq!(
                weights(&second),
                weights(&alone),
                "{name} killed at {killed_at}"
            );
            assert_eq!(second.steps_done(), STEPS);
        }
    }
}

#[test]
fn a_checkpoint_is_refused_by_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = trainer(sized(GrpoConfig::trl()));
    first.train(&prompts(), 1, &mut []).unwrap();
    first.save(dir.path()).unwrap();

    let mut other = trainer(sized(GrpoConfig::dr_grpo()));
    let before = weights(&other);
    let error = other.load(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::ConfigMismatch { field, .. } if ["aggregation", "scale"].contains(&field.as_str()))
    );
    let mut other = trainer(sized(GrpoConfig::trl()))
        .with_reward(
            "brevity",
            0.5,
            reward_fn(|_, answer| -(answer.len() as f64)),
        )
        .unwrap();
    let error = other.load(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::ConfigMismatch { field, .. } if field == "rewards"));
    assert_eq!(weights(&other), before);
}
