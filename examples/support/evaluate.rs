//! How good a policy's summaries are, on texts that no stage has trained on.

use std::error::Error;
use std::sync::Arc;

use rlhf::core::{
    Completions, Device, FinishReason, GenerationConfig, Kind, LogprobOptions, Policy, RewardModel,
    RngStreams, Tensor, generate, tch,
};
use rlhf::reward::rouge::rouge_l;

use super::task::{Pair, SummaryTask};

/// The texts to be judged on.
pub struct HeldOut {
    pub pairs: Vec<Pair>,
    pub prompts: Vec<Arc<[i64]>>,
}

impl HeldOut {
    pub fn new(pairs: Vec<Pair>, task: &SummaryTask) -> Result<Self, Box<dyn Error>> {
        let prompts = task.prompts(&pairs)?;
        Ok(Self { pairs, prompts })
    }
}

/// What an evaluation found. One summary was sampled for each text.
pub struct Evaluation {
    pub summaries: Vec<String>,
    pub scores: Vec<f64>,
    /// `Σ log π/π_ref` of each summary, nats.
    pub kl: Vec<f64>,
    pub rouge_l: Vec<f64>,
    pub lengths: Vec<f64>,
    pub finished: Vec<f64>,
}

/// Samples and judges summaries. The random numbers are the same in every call, so that before
/// and after differ by the policy alone. Without a `reference`, the policy is the reference: its
/// divergence is 0.
pub fn evaluate(
    policy: &dyn Policy,
    reference: Option<&dyn Policy>,
    reward: &dyn RewardModel,
    task: &SummaryTask,
    held_out: &HeldOut,
    generation: &GenerationConfig,
) -> Result<Evaluation, Box<dyn Error>> {
    let _no_grad = tch::no_grad_guard();
    let streams = RngStreams::new(EVALUATION_SEED);
    let written =
        generate(policy, &held_out.prompts, generation, &streams, 0)?.decoded(task.tokenizer())?;
    let summaries: Vec<String> = written
        .texts()?
        .iter()
        .map(|t| t.response.trim().to_string())
        .collect();
    let of = |reason| {
        written
            .finish_reasons
            .iter()
            .map(move |r| f64::from(*r == reason))
    };
    Ok(Evaluation {
        scores: in_chunks(&written, |part| reward.score(part))?,
        kl: in_chunks(&written, |part| {
            let Some(reference) = reference else {
                return Ok(Tensor::zeros(
                    [part.batch.len() as i64],
                    (Kind::Double, Device::Cpu),
                ));
            };
            let options = LogprobOptions {
                temperature: generation.sampling.temperature,
                entropy: false,
            };
            let (new, old) = (
                policy.logprobs(&part.batch, &options)?,
                reference.logprobs(&part.batch, &options)?,
            );
            let sum = (new.logprobs - old.logprobs).sum_dim_intlist(
                [1i64].as_slice(),
                false,
                Kind::Float,
            );
            Ok(sum)
        })?,
        rouge_l: summaries
            .iter()
            .zip(&held_out.pairs)
            .map(|(s, p)| 100.0 * rouge_l(&p.summary, s).f1)
            .collect(),
        lengths: written
            .batch
            .sequences()
            .iter()
            .map(|s| s.response.len() as f64)
            .collect(),
        finished: of(FinishReason::Stop).collect(),
        summaries,
    })
}

/// Seed of the samples that are judged; none of a run's own seeds.
const EVALUATION_SEED: u64 = 0x5eed;
const CHUNK: usize = 64;

fn in_chunks(
    completions: &Completions,
    f: impl Fn(&Completions) -> rlhf::core::Result<Tensor>,
) -> Result<Vec<f64>, Box<dyn Error>> {
    let rows: Vec<usize> = (0..completions.batch.len()).collect();
    let mut all = Vec::with_capacity(rows.len());
    for part in rows.chunks(CHUNK) {
        let values = f(&completions.select(part)?)?.to_kind(Kind::Double);
        all.extend(Vec::<f64>::try_from(values)?);
    }
    Ok(all)
}

/// Mean of `values`; 0 of none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Standard deviation of `values`, unbiased.
pub fn deviation(values: &[f64]) -> f64 {
    let centre = mean(values);
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    (squares / (values.len().max(2) - 1) as f64).sqrt()
}
