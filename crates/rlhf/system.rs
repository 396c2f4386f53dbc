//! A language model and a reward model, ready to use.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rlhf_core::{
    Completions, GenerationConfig, Generator, RewardModel, RngStreams, SamplingConfig, Sequence,
    SequenceBatch,
};
use rlhf_models::{CausalLm, LoadOptions, ModelConfig, SequenceClassifier, Tokenizer};
use rlhf_reward::{Normalized, ScoreNormalizer};

use crate::{Error, Result};

/// A language model with its tokenizer, and a reward model that judges what it writes.
///
/// ```no_run
/// use rlhf::RlhfSystem;
///
/// let system = RlhfSystem::from_pretrained("models/base", "models/reward")?;
/// let answer = system.generate_text("Summarize the following text:\n…")?;
/// println!("{answer} ({:.2})", system.get_reward(&answer)?);
/// # Ok::<(), rlhf::Error>(())
/// ```
///
/// Texts are made into tokens as they are: no special token is added. Write them into the text
/// where a model was trained with them.
pub struct RlhfSystem {
    policy: CausalLm,
    reward_model: Normalized<SequenceClassifier>,
    tokenizer: Tokenizer,
    /// The reward model's own, where its folder has one.
    reward_tokenizer: Option<Tokenizer>,
    generation: GenerationConfig,
    rng: RngStreams,
    generated: AtomicU64,
}

impl RlhfSystem {
    /// Loads both from Hugging Face folders, on the CPU and in the kind they are stored in.
    ///
    /// `base_dir` holds a causal language model and a tokenizer, `reward_dir` a sequence
    /// classifier with one label; where it keeps a scale of its scores ([`ScoreNormalizer`]), they
    /// are put on it. If `reward_dir` has no tokenizer of its own, that of
    /// `base_dir` serves both.
    ///
    /// # Errors
    /// Those of [`from_pretrained_with`](Self::from_pretrained_with).
    pub fn from_pretrained(
        base_dir: impl AsRef<Path>,
        reward_dir: impl AsRef<Path>,
    ) -> Result<Self> {
        Self::from_pretrained_with(base_dir, reward_dir, &LoadOptions::default())
    }

    /// The same on another device or in another kind.
    ///
    /// # Errors
    /// [`Error::Models`] for a folder or file that is missing, damaged, or of an unknown
    /// architecture; [`Error::TokenizerMismatch`] for a tokenizer that does not fit its model;
    /// [`Error::NotARewardModel`].
    pub fn from_pretrained_with(
        base_dir: impl AsRef<Path>,
        reward_dir: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let (base_dir, reward_dir) = (base_dir.as_ref(), reward_dir.as_ref());
        let policy = CausalLm::from_pretrained(base_dir, options)?;
        let tokenizer = Tokenizer::from_dir(base_dir)?;
        check_fits(base_dir, &tokenizer, policy.config())?;
        let reward_model = SequenceClassifier::from_pretrained(reward_dir, options)?;
        if reward_model.num_labels() != 1 {
            return Err(Error::NotARewardModel {
                path: reward_dir.to_path_buf(),
                num_labels: reward_model.num_labels(),
            });
        }
        let reward_tokenizer = match reward_dir.join("tokenizer.json").exists() {
            true => Some(Tokenizer::from_dir(reward_dir)?),
            false => None,
        };
        let judge = reward_tokenizer.as_ref().unwrap_or(&tokenizer);
        check_fits(reward_dir, judge, reward_model.config())?;
        let generation = GenerationConfig {
            sampling: SamplingConfig::greedy(),
            stop_token_ids: tokenizer.stop_token_ids().to_vec(),
            ..GenerationConfig::default()
        };
        Ok(Self {
            policy,
            reward_model: Normalized::from_dir(reward_model, reward_dir)?,
            tokenizer,
            reward_tokenizer,
            generation,
            rng: RngStreams::new(0),
            generated: AtomicU64::new(0),
        })
    }

    /// Changes how texts are written. The default is greedy: the likeliest token every time, at
    /// most 53 of them, up to one of the tokenizer's stop tokens.
    ///
    /// `samples_per_prompt` must be 1. Without stop tokens, the tokenizer's are
    /// taken.
    ///
    /// # Errors
    /// [`rlhf_core::Error::InvalidConfig`], naming the field.
    pub fn with_generation(mut self, mut config: GenerationConfig) -> Result<Self> {
        if config.stop_token_ids.is_empty() {
            config.stop_token_ids = self.tokenizer.stop_token_ids().to_vec();
        }
        config.validate()?;
        if config.samples_per_prompt != 1 {
            let field = "generation.samples_per_prompt";
            let reason = "generate_text returns one text; see rlhf::core::generate for more";
            return Err(rlhf_core::Error::config(field, config.samples_per_prompt, reason).into());
        }
        self.generation = config;
        Ok(self)
    }

    /// Changes the seed of sampled texts, 0 if never set. Systems with the same seed that are
    /// asked the same write the same.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.rng = RngStreams::new(seed);
        self.generated = AtomicU64::new(0);
        self
    }

    /// The model's continuation of `prompt`, without the prompt and without special tokens.
    ///
    /// # Errors
    /// [`Error::NoTokens`] for an empty prompt, [`rlhf_core::Error::TooLong`] for one that fills
    /// the model's context window, and the models' own.
    pub fn generate_text(&self, prompt: &str) -> Result<String> {
        let ids = encode(&self.tokenizer, "prompt", prompt)?;
        let index = self.generated.fetch_add(1, Ordering::Relaxed);
        let written = self
            .generator()?
            .generate(&[Arc::from(ids)], &self.rng, index)?;
        Ok(written.texts()?[0].response.clone())
    }

    /// The text of [`generate_text`](Self::generate_text) in pieces, each as soon as it is
    /// written: whole characters, at least one. Nothing is computed before it is asked for, and
    /// dropping the iterator ends the writing.
    ///
    /// ```no_run
    /// # let system = rlhf::RlhfSystem::from_pretrained("models/base", "models/reward")?;
    /// for piece in system.generate_text_stream("Once upon a time")? {
    ///     print!("{}", piece?);
    /// }
    /// # Ok::<(), rlhf::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`generate_text`](Self::generate_text); the models' own from the iterator.
    pub fn generate_text_stream(
        &self,
        prompt: &str,
    ) -> Result<impl Iterator<Item = Result<String>> + '_> {
        let ids = encode(&self.tokenizer, "prompt", prompt)?;
        let index = self.generated.fetch_add(1, Ordering::Relaxed);
        let pieces = self
            .generator()?
            .stream(&[Arc::from(ids)], &self.rng, index)?;
        Ok(pieces.filter_map(|piece| match piece {
            Ok(piece) => (!piece.text.is_empty()).then_some(Ok(piece.text)),
            Err(error) => Some(Err(error.into())),
        }))
    }

    fn generator(&self) -> Result<Generator<'_, CausalLm>> {
        let generator = Generator::new(&self.policy, &self.generation)?;
        Ok(generator.with_detokenizer(&self.tokenizer))
    }

    /// What the reward model thinks of a whole text, prompt and response together.
    ///
    /// # Errors
    /// [`Error::NoTokens`] for an empty text, [`rlhf_core::Error::TooLong`], and the models' own.
    pub fn get_reward(&self, text: &str) -> Result<f64> {
        let ids = encode(self.reward_tokenizer(), "text", text)?;
        self.score(Sequence::new(ids, []))
    }

    /// What the reward model thinks of `response` as an answer to `prompt`. The two are made into
    /// tokens apart, as they are in training, so that no token reaches across their border.
    ///
    /// # Errors
    /// Those of [`get_reward`](Self::get_reward); an empty response is allowed.
    pub fn get_reward_for(&self, prompt: &str, response: &str) -> Result<f64> {
        let prompt = encode(self.reward_tokenizer(), "prompt", prompt)?;
        let response = self.reward_tokenizer().encode(response)?;
        self.score(Sequence::new(prompt, response))
    }

    fn score(&self, sequence: Sequence) -> Result<f64> {
        let _no_grad = rlhf_core::tch::no_grad_guard();
        let completions = Completions::written(SequenceBatch::new(vec![sequence])?);
        let scores = self.reward_model.score(&completions)?;
        Ok(scores
            .f_double_value(&[0])
            .map_err(rlhf_core::Error::from)?)
    }

    /// The language model.
    pub fn policy(&self) -> &CausalLm {
        &self.policy
    }

    /// The language model, to be trained.
    pub fn policy_mut(&mut self) -> &mut CausalLm {
        &mut self.policy
    }

    /// The reward model.
    pub fn reward_model(&self) -> &SequenceClassifier {
        self.reward_model.model()
    }

    /// The scale of the reward model's scores: that of its folder, or none.
    pub fn score_normalizer(&self) -> ScoreNormalizer {
        self.reward_model.normalizer()
    }

    /// The language model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The reward model's tokenizer: its own, or the language model's.
    pub fn reward_tokenizer(&self) -> &Tokenizer {
        self.reward_tokenizer.as_ref().unwrap_or(&self.tokenizer)
    }

    /// How texts are written.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Takes the models and the language model's tokenizer out, for a trainer.
    pub fn into_parts(self) -> (CausalLm, Normalized<SequenceClassifier>, Tokenizer) {
        (self.policy, self.reward_model, self.tokenizer)
    }
}

fn encode(tokenizer: &Tokenizer, what: &'static str, text: &str) -> Result<Vec<i64>> {
    let ids = tokenizer.encode(text)?;
    if ids.is_empty() {
        let text = text.to_string();
        return Err(Error::NoTokens { what, text });
    }
    Ok(ids)
}

fn check_fits(dir: &Path, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<()> {
    tokenizer
        .check_fits(config)
        .map_err(|source| Error::TokenizerMismatch {
            path: dir.to_path_buf(),
            source,
        })
}
