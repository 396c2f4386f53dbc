//! Pretraining texts in the loss.

use super::*;

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
