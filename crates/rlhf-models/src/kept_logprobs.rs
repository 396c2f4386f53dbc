//! Log-probabilities within the tokens that a sampling filter kept.

use rlhf_core::{DROPPED_LOGIT, KeptSet, LogprobOptions, dropped_mask};
use rlhf_scale::{VocabularyShard, checkpoint, enter_parallel};

use crate::causal_lm::whole_logits;
use tch::{Kind, Tensor};

/// Logits that exist at a time, at most: 64 MiB of f32.
const CHUNK_ELEMENTS: i64 = 1 << 24;

/// The output layer and what it is asked for.
pub(crate) struct KeptLogprobs<'a> {
    /// `[V, H]`.
    pub(crate) weight: &'a Tensor,
    /// Bound of the logits.
    pub(crate) softcap: Option<f64>,
    /// Which tokens the rows of the weight are, where other ranks have the others.
    pub(crate) shard: Option<&'a VocabularyShard>,
    pub(crate) options: LogprobOptions,
    /// Tokens whose logits exist at a time.
    pub(crate) chunk_rows: Option<usize>,
}

impl KeptLogprobs<'_> {
    /// Log-probabilities of `ids` `[M]` from the hidden states `[M, H]` that predict them, each
    /// within its set; and entropies where they are asked for. Both `[M]` f32. Logits are computed
    /// again for backward, a chunk at a time.
    pub(crate) fn of(
        &self,
        hidden: &Tensor,
        ids: &Tensor,
        sets: &[&KeptSet],
    ) -> rlhf_core::Result<(Tensor, Option<Tensor>)> {
        let vocab = match self.shard {
            None => self.weight.size()[0],
            Some(shard) => shard.vocabulary,
        };
        let entered = match self.shard {
            None => hidden.shallow_clone(),
            Some(shard) => enter_parallel(hidden, &shard.group)?,
        };
        let tokens = ids.size()[0];
        let fitting = (CHUNK_ELEMENTS / vocab.max(1)).max(1);
        let step = self.chunk_rows.map_or(fitting, |rows| rows as i64);
        let mut parts = Vec::new();
        let mut start = 0;
        while start < tokens {
            let rows = step.min(tokens - start);
            let hidden = entered.f_narrow(0, start, rows)?;
            let chosen = ids.f_narrow(0, start, rows)?.f_unsqueeze(1)?;
            let sets: Vec<KeptSet> = sets[start as usize..(start + rows) as usize]
                .iter()
                .map(|set| (*set).clone())
                .collect();
            let (weight, softcap) = (self.weight.shallow_clone(), self.softcap);
            let options = self.options;
            let shard = self.shard.cloned();
            let outputs = checkpoint(&[&hidden], move |inputs| {
                let mut logits = inputs[0]
                    .f_linear(&weight, None::<&Tensor>)?
                    .f_to_kind(Kind::Float)?;
                if let Some(cap) = softcap {
                    logits = logits.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
                }
                if let Some(shard) = &shard {
                    logits = whole_logits(&logits, shard)?;
                }
                let sets: Vec<&KeptSet> = sets.iter().collect();
                let dropped = dropped_mask(&sets, vocab, logits.device())?;
                let logits = logits
                    .f_div_scalar(options.temperature)?
                    .f_masked_fill(&dropped, DROPPED_LOGIT)?;
                let logprobs = logits.f_log_softmax(-1, Kind::Float)?;
                let mut columns = vec![logprobs.f_gather(1, &chosen, false)?.f_squeeze_dim(1)?];
                if options.entropy {
                    let products = logprobs.f_exp()?.f_mul(&logprobs)?;
                    let sum = products.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
                    columns.push(sum.f_neg()?);
                }
                Ok::<_, rlhf_scale::Error>(columns)
            })?;
            parts.push(outputs);
            start += rows;
        }
        let joined = |column: usize| -> rlhf_core::Result<Tensor> {
            let columns: Vec<&Tensor> = parts.iter().filter_map(|part| part.get(column)).collect();
            match columns.is_empty() {
                true => Ok(Tensor::f_zeros([0], (Kind::Float, ids.device()))?),
                false => Ok(Tensor::f_cat(&columns, 0)?),
            }
        };
        let entropy = self.options.entropy.then(|| joined(1)).transpose()?;
        Ok((joined(0)?, entropy))
    }
}
