//! A trainer with a model of 16 bits, end to end: it learns as in f32, and no overflow reaches the
//! weights.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use rlhf_models::{CausalLm, Gpt2Config, ModelConfig};
use rlhf_scale::{LossScale, Precision};
use rlhf_sft::core::{Parameters, Sequence, SequenceBatch};
use rlhf_sft::{SftConfig, SftTrainer};
use tch::{Device, Kind, Tensor};

const STEPS: usize = 30;

fn trainer(precision: Precision, loss_scale: Option<LossScale>) -> SftTrainer<CausalLm> {
    let config = ModelConfig::Gpt2(Gpt2Config {
        vocab_size: 40,
        n_positions: 32,
        n_embd: 32,
        n_layer: 2,
        n_head: 4,
        ..Gpt2Config::default()
    });
    let model = CausalLm::new(config, 3, Device::Cpu, precision.kind()).unwrap();
    let mut config = SftConfig {
        microbatch_size: 4,
        ..SftConfig::default()
    };
    config.update.optimizer.lr = 5e-3;
    config.update = config.update.for_precision(precision);
    if loss_scale.is_some() {
        config.update.loss_scale = loss_scale;
    }
    SftTrainer::new(model, config).unwrap()
}

/// Counting: each token is the one before it plus a step that the prompt tells.
fn batch(step: usize) -> SequenceBatch {
    let sequence = |row: usize| {
        let (first, by) = ((7 * step + 3 * row) as i64 % 40, 1 + (row % 3) as i64);
        let token = |i: i64| (first + by * i) % 40;
        let response: Vec<i64> = (3..9 + (row % 4) as i64).map(token).collect();
        Sequence::new([token(0), token(1), token(2)], response)
    };
    SequenceBatch::new((0..8).map(sequence).collect()).unwrap()
}

fn bytes(tensors: impl IntoIterator<Item = Tensor>) -> Vec<Vec<u8>> {
    let bytes = |tensor: Tensor| {
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        bytes
    };
    tensors.into_iter().map(bytes).collect()
}

fn weights(trainer: &SftTrainer<CausalLm>) -> Vec<Vec<u8>> {
    bytes(
        trainer
            .model()
            .named_parameters()
            .into_iter()
            .map(|(_, p)| p),
    )
}

/// The losses of a run.
fn losses(trainer: &mut SftTrainer<CausalLm>) -> Vec<f64> {
    (0..STEPS)
        .map(|step| trainer.step(&batch(step)).unwrap().get("sft/loss").unwrap())
        .collect()
}

/// A 16-bit model's loss differs from the f32 model's by what rounding weights and activations does:
/// relative errors of 2⁻⁹ and 2⁻¹² an operation, some tens of operations deep, on a loss of up to
/// ln 40 = 3.7. Over a run the paths drift apart by a little more.
#[test]
fn sixteen_bits_learn_as_f32_does() {
    let exact = losses(&mut trainer(Precision::F32, None));
    assert!(
        exact[STEPS - 1] < 0.6 * exact[0],
        "f32 does not learn: {exact:?}"
    );
    for (precision, first, along) in [(Precision::Bf16, 0.02, 0.15), (Precision::F16, 0.003, 0.05)]
    {
        let mut trainer = trainer(precision, None);
        let rounded = losses(&mut trainer);
        let difference = |i: usize| (rounded[i] - exact[i]).abs();
        assert!(
            difference(0) < first,
            "{precision:?}: {} and {}",
            rounded[0],
            exact[0]
        );
        let worst = (0..STEPS).map(difference).fold(0.0, f64::max);
        assert!(
            worst < along,
            "{precision:?}: {worst}\n{rounded:?}\n{exact:?}"
        );
        for (name, parameter) in trainer.model().named_parameters() {
            assert_eq!(parameter.kind(), precision.kind(), "{name}");
        }
        for (name, state) in trainer
            .updater()
            .ema()
            .map(|e| e.state())
            .unwrap_or_default()
        {
            assert_eq!(state.kind(), Kind::Float, "{name}");
        }
    }
}

/// At a scale far too large the gradients of f16 overflow: the steps are skipped, no bit of the model
/// changes, the scale falls by halves, and then training goes on as if nothing had been.
#[test]
fn an_overflow_never_reaches_the_weights() {
    let scale = LossScale {
        initial: f64::from(1u32 << 30),
        ..LossScale::default()
    };
    let mut disturbed = trainer(Precision::F16, Some(scale));
    let before = weights(&disturbed);
    let mut skipped = 0;
    loop {
        let stats = disturbed.step(&batch(0)).unwrap();
        if stats.get("sft/skipped").unwrap() == 0.0 {
            break;
        }
        skipped += 1;
        assert_eq!(weights(&disturbed), before, "an overflow moved a weight");
        assert_eq!(disturbed.updater().step(), 0);
        assert!(skipped < 30, "the scale does not fall");
    }
    assert!(skipped > 3, "{skipped} overflows");
    assert_ne!(weights(&disturbed), before);
    assert_eq!(disturbed.updater().step(), 1);
    let scaler = disturbed.updater().loss_scaler().unwrap();
    assert_eq!(scaler.skipped_steps(), skipped);
    for (name, parameter) in disturbed.model().named_parameters() {
        let finite = bool::try_from(parameter.isfinite().all()).unwrap();
        assert!(finite, "{name}");
    }
}
