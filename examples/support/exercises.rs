//! What the base model learns from, and its loss.

use std::error::Error;

use rand::Rng;
use rlhf::core::{Device, Kind, Sequence, SequenceBatch, Stats, Tensor, gather_logprobs};
use rlhf::models::CausalLm;

use super::task::SummaryTask;

/// What the lessons are made of.
#[derive(Debug, Clone, PartialEq, clap::Args, serde::Serialize, serde::Deserialize)]
pub struct Mixture {
    /// Weight of a text token's loss; a summary token's is 1.
    #[arg(long, default_value_t = 0.3)]
    pub text_weight: f64,
    /// Share of the text tokens that are scored.
    #[arg(long, default_value_t = 0.25)]
    pub text_share: f64,
    /// Share of the sequences that are copying exercises.
    #[arg(long, default_value_t = 0.25)]
    pub copy_share: f64,
}

/// A sequence to learn from.
pub struct Exercise {
    pub sequence: Sequence,
    copies: bool,
}

impl Exercise {
    /// The example itself or, by chance, an exercise in copying a piece of its text.
    pub fn draw(
        example: &Sequence,
        mixture: &Mixture,
        task: &SummaryTask,
        rng: &mut impl Rng,
    ) -> Self {
        let text = &example.prompt[task.instruction_len()..example.prompt.len() - task.cue_len()];
        if text.is_empty() || rng.random::<f64>() >= mixture.copy_share {
            return Self {
                sequence: example.clone(),
                copies: false,
            };
        }
        let length = rng.random_range(8..=28usize).min(text.len());
        let start = rng.random_range(0..=text.len() - length);
        let piece = &text[start..start + length];
        let sequence = Sequence::new(task.prompt_of(piece), [piece, &[task.stop()]].concat());
        Self {
            sequence,
            copies: true,
        }
    }
}

/// Cross-entropy of the responses and of some of the texts' tokens, over the number of response
/// tokens; and the mean of each kind.
pub fn weighted_loss(
    model: &CausalLm,
    batch: &SequenceBatch,
    exercises: &[Exercise],
    mixture: &Mixture,
    task: &SummaryTask,
    rng: &mut impl Rng,
) -> Result<(Tensor, Stats), Box<dyn Error>> {
    const KINDS: [&str; 3] = ["base/summary_nll", "base/copy_nll", "base/text_nll"];
    let packed = batch.packed(Device::Cpu);
    let (mut rows, mut ids, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (exercise, sequence)) in exercises.iter().zip(batch.sequences()).enumerate() {
        let tokens: Vec<i64> = packed.rows(i).collect();
        let prompt = sequence.prompt.len();
        let text = task.instruction_len()..prompt - task.cue_len();
        for (at, id) in sequence.tokens().enumerate() {
            let kind = match exercise.copies {
                _ if text.contains(&at) && rng.random::<f64>() < mixture.text_share => 2,
                true if at >= prompt => 1,
                false if at >= prompt => 0,
                _ => continue,
            };
            rows.push(tokens[at - 1]);
            ids.push(id);
            kinds.push(kind);
        }
    }
    let hidden = model
        .hidden_states(&packed)?
        .index_select(0, &Tensor::from_slice(&rows));
    let nll = -gather_logprobs(&model.logits_of(&hidden)?, &Tensor::from_slice(&ids));
    let kinds = Tensor::from_slice(&kinds);
    let (mut loss, mut means) = (Tensor::from(0f32), Stats::new());
    for (kind, (name, weight)) in KINDS
        .iter()
        .zip([1.0, 1.0, mixture.text_weight])
        .enumerate()
    {
        let mask = kinds.eq(kind as i64);
        let count = f64::try_from(mask.sum(Kind::Float))?;
        if count > 0.0 {
            let sum = (&nll * mask.to_kind(Kind::Float)).sum(Kind::Float);
            means.insert(*name, f64::try_from(&sum)? / count);
            loss += sum * weight;
        }
    }
    Ok((loss / batch.response_tokens() as f64, means))
}
