//! Having responses written, or taking in what somebody else wrote.

use std::sync::Arc;

use rlhf_core::{
    Completions, Detokenize, GenerationConfig, Generator, Policy, Replicas, RngStreams,
};

use crate::Result;

/// Samples responses to `prompts` with the random numbers of `seed` from completion `first` on,
/// with texts where there is a detokenizer, and with what filters left to draw from. Each of
/// several processes writes its share, and all get all of them.
pub(crate) fn write(
    policy: &dyn Policy,
    generation: &GenerationConfig,
    detokenizer: Option<&dyn Detokenize>,
    prompts: &[Arc<[i64]>],
    (seed, first): (u64, u64),
) -> Result<Completions> {
    let mut generator = Generator::new(policy, generation)?.with_kept_tokens();
    if let Some(detokenizer) = detokenizer {
        generator = generator.with_detokenizer(detokenizer);
    }
    let (replicas, rng) = (Replicas::current(), RngStreams::new(seed));
    Ok(generator.generate_shared(&replicas, prompts, &rng, first)?)
}

/// Attaches the texts that are missing, where there is a detokenizer.
pub(crate) fn with_texts(
    completions: Completions,
    detokenizer: Option<&dyn Detokenize>,
) -> Result<Completions> {
    match detokenizer {
        Some(detokenizer) if completions.texts.is_none() => Ok(completions.decoded(detokenizer)?),
        _ => Ok(completions),
    }
}
