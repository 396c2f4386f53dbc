//! A language model with a value head on its trunk.

use rlhf_core::{
    ActorCritic, Decoder, KeptTokens, LogprobOptions, PaddedBatch, ParameterShards, Parameters,
    Policy, SequenceBatch, TokenLogprobs, check_kept,
};
use tch::{Device, Kind, Tensor};

use crate::CausalLm;
use crate::pipeline_parallel::Stage;
use crate::value_head::{ValueHeadInit, padded_values, values_elsewhere};
use crate::weights::fresh;

/// Name of the head among the parameters.
const HEAD: &str = "v_head.summary";

/// A language model with a critic on the same trunk: what `AutoModelForCausalLMWithValueHead` of
/// TRL is. Log-probabilities and values come from one forward pass, the trunk is trained by both
/// losses, and there is no second model to keep.
///
/// The head is f32 whatever the trunk's kind: the values of neighbouring states are close.
///
/// ```
/// use rlhf_core::{ActorCritic, LogprobOptions, Sequence, SequenceBatch};
/// use rlhf_models::{CausalLm, CausalLmWithValueHead, LoadOptions, ValueHeadInit};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models/llama");
///
/// let policy = CausalLm::from_pretrained(folder, &LoadOptions::default())?;
/// let model = CausalLmWithValueHead::new(policy, ValueHeadInit::Zeros, 0)?;
/// let batch = SequenceBatch::new(vec![Sequence::new([5, 6, 7], [8, 9])])?;
/// let (scores, values) = model.logprobs_and_values(&batch, None, &LogprobOptions::default())?;
/// assert_eq!((scores.logprobs.size(), values.size()), (vec![1, 2], vec![1, 3]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CausalLmWithValueHead {
    lm: CausalLm,
    /// `[1, H]` f32.
    weight: Tensor,
    /// `[1]` f32.
    bias: Tensor,
}

impl CausalLmWithValueHead {
    /// Puts a head on a language model.
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn new(lm: CausalLm, init: ValueHeadInit, seed: u64) -> crate::Result<Self> {
        let width = lm.config().hidden_size();
        let weight = fresh(seed, HEAD, &[1, width], init.of_width(width))?;
        let bias = Tensor::f_zeros([1], (Kind::Float, lm.device()))?;
        Ok(Self {
            weight: weight.f_to_device(lm.device())?.f_set_requires_grad(true)?,
            bias: bias.f_set_requires_grad(true)?,
            lm,
        })
    }

    /// The language model.
    pub fn language_model(&self) -> &CausalLm {
        &self.lm
    }

    /// The language model without the head.
    pub fn into_language_model(self) -> CausalLm {
        self.lm
    }

    /// Hidden states of every state of the responses, `[S + B, H]`.
    fn states(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        let packed = self.lm.model.checked_packed(batch)?;
        self.lm.model.hidden_states_of(&packed, packed.state_rows())
    }

    /// What the last stage computes, in all.
    fn both_in_turns(
        &self,
        stage: &Stage,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<(TokenLogprobs, Tensor)> {
        // What may be wrong must be found in all stages.
        if let Some(kept) = kept {
            check_kept(batch, kept)?;
        }
        let mask = batch.response_mask(Policy::device(&self.lm));
        let width = mask.size()[1];
        let mut columns = stage.in_turns(batch, width + 1, |part, rows| {
            let kept = kept.map(|kept| &kept[rows]);
            let (scores, values) = self.both_at_once(part, kept, options)?;
            let entropy = scores.entropy.into_iter();
            Ok([values, scores.logprobs]
                .into_iter()
                .chain(entropy)
                .collect())
        })?;
        let of_tokens = columns.split_off(1);
        let of_tokens = of_tokens.iter().map(|column| column.f_narrow(1, 0, width));
        let mut of_tokens = of_tokens.collect::<Result<Vec<_>, _>>()?.into_iter();
        let scores = TokenLogprobs {
            logprobs: of_tokens.next().unwrap_or_default(),
            entropy: of_tokens.next(),
            mask,
        };
        Ok((scores, columns.pop().unwrap_or_default()))
    }

    fn both_at_once(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<(TokenLogprobs, Tensor)> {
        let states = self.states(batch)?;
        let hidden = match self.lm.model.trunk.has_end() {
            true => &states.f_index_select(0, &predicting(batch, states.device()))?,
            false => &states,
        };
        let scores = self.lm.scores(batch, hidden, kept, options)?;
        Ok((scores, self.values_of(batch, &states)?))
    }

    fn values_of(&self, batch: &SequenceBatch, states: &Tensor) -> rlhf_core::Result<Tensor> {
        if !self.lm.model.trunk.has_end() {
            return values_elsewhere(batch, states);
        }
        let states = states.f_to_kind(Kind::Float)?;
        let values = states.f_linear(&self.weight, Some(&self.bias))?;
        padded_values(batch, &values.f_squeeze_dim(1)?)
    }
}

/// Which of the states predict a token: all but the last of each sequence.
fn predicting(batch: &SequenceBatch, device: Device) -> Tensor {
    let mut rows = Vec::with_capacity(batch.response_tokens());
    let mut first = 0;
    for sequence in batch.sequences() {
        let tokens = sequence.response.len() as i64;
        rows.extend(first..first + tokens);
        first += tokens + 1;
    }
    Tensor::from_slice(&rows).to_device(device)
}

impl Parameters for CausalLmWithValueHead {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let mut named = self.lm.named_parameters();
        // The head of a model in stages is used, and so trained, in the last.
        if self.lm.model.trunk.has_end() {
            named.push((format!("{HEAD}.bias"), self.bias.shallow_clone()));
            named.push((format!("{HEAD}.weight"), self.weight.shallow_clone()));
        }
        named.sort_by(|a, b| a.0.cmp(&b.0));
        named
    }

    fn parameter_shards(&self) -> Option<ParameterShards> {
        self.lm.parameter_shards()
    }
}

impl ActorCritic for CausalLmWithValueHead {
    fn logprobs_and_values(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<(TokenLogprobs, Tensor)> {
        if let Some(stage) = self.lm.model.trunk.sharing() {
            return self.both_in_turns(stage, batch, kept, options);
        }
        self.both_at_once(batch, kept, options)
    }

    fn state_values(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        let of = |part: &SequenceBatch| self.values_of(part, &self.states(part)?);
        let Some(stage) = self.lm.model.trunk.sharing() else {
            return of(batch);
        };
        let width = batch.max_response_len() as i64 + 1;
        let values = stage.in_turns(batch, width, |part, _| Ok(vec![of(part)?]))?;
        Ok(values.into_iter().next().unwrap_or_default())
    }
}

/// All as the language model does it.
impl Policy for CausalLmWithValueHead {
    fn logits(&self, batch: &PaddedBatch) -> rlhf_core::Result<Tensor> {
        self.lm.logits(batch)
    }

    fn device(&self) -> Device {
        Policy::device(&self.lm)
    }

    fn pad_token_id(&self) -> i64 {
        self.lm.pad_token_id()
    }

    fn max_length(&self) -> Option<usize> {
        self.lm.max_length()
    }

    fn logprobs(
        &self,
        batch: &SequenceBatch,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        self.lm.logprobs(batch, options)
    }

    fn logprobs_within(
        &self,
        batch: &SequenceBatch,
        kept: &[KeptTokens],
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        self.lm.logprobs_within(batch, kept, options)
    }

    fn disable_dropout(&mut self) {
        self.lm.disable_dropout();
    }

    fn decoder(&self, max_new_tokens: usize) -> rlhf_core::Result<Box<dyn Decoder + '_>> {
        self.lm.decoder(max_new_tokens)
    }
}
