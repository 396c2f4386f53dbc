//! A model of one's own, trained by `rlhf-ppo` alone.
//!
//! A recurrent network that has never seen a digit learns to count: given `4`, it is to go on
//! with `56789012`. Nobody shows it how. All it hears is which share of what it wrote was right.
//!
//! The file is written as a crate that depends on `rlhf-ppo` and on nothing else would be:
//!
//! ```sh
//! cargo run --release --example custom_policy
//! ```

#![allow(clippy::print_stdout)] // an example talks to its user

use std::sync::Arc;

use rlhf_ppo::core::{
    Error, GenerationConfig, Observer, PaddedBatch, PaddingSide, Parameters, Policy,
    ProgressObserver, Result, RngStreams, Sequence, SequenceBatch, ValueModel, generate, reward_fn,
};
use rlhf_ppo::tch::{Device, Kind, Tensor};
use rlhf_ppo::{KlControl, MissingEos, PpoConfig, PpoTrainer};

const STEPS: u64 = 60;
/// One token for each digit.
const VOCABULARY: i64 = 10;
const HIDDEN: i64 = 32;

/// A gated recurrent network with a linear layer on top: no transformer, and none of ours.
struct Network {
    /// Sorted by name.
    weights: Vec<(&'static str, Tensor)>,
}

impl Network {
    fn new(outputs: i64) -> Self {
        let weight = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.1;
        let weights = [
            ("embedding", weight(&[VOCABULARY, HIDDEN])),
            ("gru.bias_hh", weight(&[3 * HIDDEN])),
            ("gru.bias_ih", weight(&[3 * HIDDEN])),
            ("gru.weight_hh", weight(&[3 * HIDDEN, HIDDEN])),
            ("gru.weight_ih", weight(&[3 * HIDDEN, HIDDEN])),
            ("output", weight(&[outputs, HIDDEN])),
        ];
        Self {
            weights: weights
                .map(|(name, weight)| (name, weight.set_requires_grad(true)))
                .into(),
        }
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let [embedding, bias_hh, bias_ih, weight_hh, weight_ih, output] =
            [0, 1, 2, 3, 4, 5].map(|i| &self.weights[i].1);
        let inputs = Tensor::f_embedding(embedding, ids, -1, false, false)?; // [B, T, H]
        let start = Tensor::zeros([1, ids.size()[0], HIDDEN], (Kind::Float, Device::Cpu));
        let layer = [weight_ih, weight_hh, bias_ih, bias_hh];
        let (states, _) = inputs.f_gru(&start, &layer, true, 1, 0.0, false, false, true)?;
        Ok(states.f_matmul(&output.tr())?) // [B, T, outputs]
    }

    fn copied(&self) -> Self {
        let copy = |(name, weight): &(_, Tensor)| (*name, weight.detach().copy());
        Self {
            weights: self.weights.iter().map(copy).collect(),
        }
    }
}

impl Parameters for Network {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let aliases = |(name, weight): &(&str, Tensor)| (name.to_string(), weight.shallow_clone());
        self.weights.iter().map(aliases).collect()
    }
}

/// The network as a language model: one logit for each token.
struct Counter(Network);

impl Parameters for Counter {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.0.named_parameters()
    }
}

impl Policy for Counter {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        self.0.forward(&batch.input_ids)
    }
}

/// The network as a critic: one value for each state.
struct Critic(Network);

impl Parameters for Critic {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.0.named_parameters()
    }
}

impl ValueModel for Critic {
    fn values(&self, batch: &SequenceBatch) -> Result<Tensor> {
        let padded = batch.padded(0, PaddingSide::Right, Device::Cpu);
        let values = self.0.forward(&padded.input_ids)?.squeeze_dim(-1); // [B, T]
        // Before response token t, the state is the one after token P + t - 1.
        let last = batch.max_len() as i64 - 1;
        let columns: Vec<i64> = batch
            .sequences()
            .iter()
            .flat_map(|s| (0..=batch.max_response_len()).map(|t| (s.prompt.len() + t) as i64 - 1))
            .map(|column| column.min(last))
            .collect();
        let columns = Tensor::from_slice(&columns).view([batch.len() as i64, -1]);
        Ok(values.f_gather(1, &columns, false)?) // [B, R + 1]
    }
}

/// The share of the response's digits that follow the digit before them.
fn counted(prompt: &str, response: &str) -> f64 {
    let digits: Vec<u32> = (prompt.chars().chain(response.chars()))
        .filter_map(|c| c.to_digit(10))
        .collect();
    let right = digits.windows(2).filter(|d| d[1] == (d[0] + 1) % 10);
    right.count() as f64 / response.len() as f64
}

fn text(ids: &[i64]) -> Result<String> {
    let digit = |id: &i64| char::from_digit(*id as u32, 10);
    let text: Option<String> = ids.iter().map(digit).collect();
    text.ok_or_else(|| Error::model("only digits have a text"))
}

/// Prints what a policy writes, and returns how well it counts.
fn show(policy: &Counter, prompts: &[Arc<[i64]>], generation: &GenerationConfig) -> Result<f64> {
    let written = generate(policy, prompts, generation, &RngStreams::new(99), 0)?;
    let mut total = 0.0;
    for Sequence { prompt, response } in written.batch.sequences() {
        let (prompt, response) = (text(prompt)?, text(response)?);
        let score = counted(&prompt, &response);
        println!("  {prompt} -> {response}   {score:.2}");
        total += score;
    }
    Ok(total / written.batch.len() as f64)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    rlhf_ppo::tch::manual_seed(1);
    let policy = Counter(Network::new(VOCABULARY));
    let reference = Counter(policy.0.copied());
    let critic = Critic(Network::new(1));

    let mut config = PpoConfig {
        batch_size: 64,
        microbatch_size: 64,
        missing_eos: MissingEos::Keep, // there is no stop token
        kl_control: KlControl::Fixed { kl_coef: 0.002 },
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 8;
    config.generation.sampling.temperature = 1.0;
    config.update.optimizer.lr = 0.01;
    config.update.max_grad_norm = Some(1.0);
    let generation = config.generation.clone();

    let prompts: Vec<Arc<[i64]>> = (0..VOCABULARY).map(|digit| [digit].into()).collect();
    println!("before");
    let before = show(&policy, &prompts, &generation)?;

    let mut trainer = PpoTrainer::new(config, policy, critic, reference, reward_fn(counted))?
        .with_detokenizer(text);
    let mut observers: Vec<Box<dyn Observer>> = vec![Box::new(ProgressObserver::new([
        "ppo/score/mean",
        "ppo/kl",
    ]))];
    trainer.train(&prompts, STEPS, &mut observers)?;

    println!("after");
    let after = show(trainer.policy(), &prompts, &generation)?;
    println!("counted right: {before:.2} before, {after:.2} after {STEPS} steps");
    Ok(())
}
