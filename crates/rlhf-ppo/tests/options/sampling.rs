//! What the sampler left out, and where it was off.

use super::*;

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
