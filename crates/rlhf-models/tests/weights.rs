//! Weights: fresh, live, copied, trained; and what a batch must be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{assert_close, load, logprobs, model_dir, three_answers};
use rlhf_models::core::{
    Error as CoreError, LogprobOptions, Parameters, Policy, Sequence, SequenceBatch,
};
use rlhf_models::tch::{Device, Kind, Tensor};
use rlhf_models::{
    CausalLm, Error, Gemma2Config, Gpt2Config, GptNeoxConfig, LlamaConfig, MistralConfig,
    ModelConfig, Qwen2Config, Qwen3Config, SequenceClassifier, SlidingWindow, TransformerConfig,
};

fn small() -> [ModelConfig; 7] {
    let gpt2 = Gpt2Config {
        vocab_size: 400,
        n_positions: 32,
        n_embd: 64,
        n_layer: 2,
        n_head: 4,
        ..Gpt2Config::default()
    };
    let transformer = TransformerConfig {
        vocab_size: 400,
        max_position_embeddings: 32,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        ..TransformerConfig::default()
    };
    let window = || {
        Some(SlidingWindow {
            length: 2,
            layers: vec![false, true],
        })
    };
    let llama = LlamaConfig {
        transformer: transformer.clone(),
        attention_bias: true,
        mlp_bias: true,
    };
    let neox = GptNeoxConfig {
        vocab_size: 400,
        max_position_embeddings: 32,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        use_parallel_residual: false,
        ..GptNeoxConfig::default()
    };
    let mistral = MistralConfig {
        transformer: transformer.clone(),
        sliding_window: Some(3),
    };
    let qwen2 = Qwen2Config {
        transformer: transformer.clone(),
        sliding_window: window(),
    };
    let qwen3 = Qwen3Config {
        transformer: transformer.clone(),
        attention_bias: true,
        sliding_window: window(),
    };
    let gemma2 = Gemma2Config {
        transformer,
        sliding_window: window(),
        attn_logit_softcapping: None,
        ..Gemma2Config::default()
    };
    [
        ModelConfig::Gpt2(gpt2),
        ModelConfig::Llama(llama),
        ModelConfig::GptNeox(neox),
        ModelConfig::Mistral(mistral),
        ModelConfig::Qwen2(qwen2),
        ModelConfig::Qwen3(qwen3),
        ModelConfig::Gemma2(gemma2),
    ]
}

#[test]
fn fresh_models_depend_on_the_seed_alone() {
    for config in small() {
        let new = |seed| CausalLm::new(config.clone(), seed, Device::Cpu, Kind::Float).unwrap();
        assert_eq!(logprobs(&new(3)), logprobs(&new(3)));
        assert_ne!(logprobs(&new(3)), logprobs(&new(4)));
        // Near-uniform predictions: log(400) is 5.99.
        let mean = -logprobs(&new(3))
            .masked_select(&three_answers().response_mask(Device::Cpu))
            .mean(None)
            .double_value(&[]);
        assert!((mean - 400f64.ln()).abs() < 0.2, "{mean}");
        let dir = tempfile::tempdir().unwrap();
        new(3).save_pretrained(dir.path()).unwrap();
        assert_eq!(ModelConfig::from_dir(dir.path()).unwrap(), config);
        assert_eq!(logprobs(&load(dir.path()).unwrap()), logprobs(&new(3)));
    }
}

#[test]
fn fresh_weights_are_drawn_as_transformers_draws_them() {
    let [config, ..] = small();
    let model = CausalLm::new(config, 1, Device::Cpu, Kind::Float).unwrap();
    let std = |name: &str| {
        let all = model.named_parameters();
        let (_, weight) = all.into_iter().find(|(n, _)| n == name).unwrap();
        weight.std(true).double_value(&[])
    };
    let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.05, "{got}, {want}");
    near(std("transformer.wte.weight"), 0.02);
    near(std("transformer.h.0.attn.c_attn.weight"), 0.02);
    near(std("transformer.h.1.attn.c_proj.weight"), 0.02 / 2.0);
    near(std("transformer.h.0.mlp.c_proj.weight"), 0.02 / 2.0);
    assert_eq!(std("transformer.h.0.mlp.c_fc.bias"), 0.0);
    assert_eq!(std("transformer.ln_f.weight"), 0.0);
}

#[test]
fn parameters_are_live_sorted_and_not_shared_with_clones() {
    let mut model = load(model_dir("gpt2")).unwrap();
    let names: Vec<String> = model.named_parameters().into_iter().map(|p| p.0).collect();
    assert!(names.is_sorted());
    assert!(!names.contains(&"lm_head.weight".to_string()), "tied");
    let copy = model.try_clone().unwrap();
    let before = logprobs(&model);
    {
        let _guard = rlhf_models::tch::no_grad_guard();
        for (_, mut weight) in model.named_parameters() {
            let _ = weight.g_mul_scalar_(1.5);
        }
    }
    assert_ne!(logprobs(&model), before);
    assert_eq!(logprobs(&copy), before);
    // The file that the weights were mapped from is untouched.
    assert_eq!(logprobs(&load(model_dir("gpt2")).unwrap()), before);
    model.set_trainable(false);
    assert!(model.named_parameters().is_empty());
    assert!(!logprobs(&model).requires_grad());
    model.set_trainable(true);
    assert_eq!(model.named_parameters().len(), names.len());
    assert!(logprobs(&model).requires_grad());
}

/// A policy with nothing of its own but `logits`, so that every default is used.
struct Padded(CausalLm);

impl Parameters for Padded {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.0.named_parameters()
    }
}

impl Policy for Padded {
    fn logits(&self, batch: &rlhf_models::core::PaddedBatch) -> rlhf_models::core::Result<Tensor> {
        self.0.logits(batch)
    }
}

#[test]
fn packed_gradients_equal_padded_ones() {
    for name in [
        "gpt2", "llama", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma2",
    ] {
        let options = LogprobOptions {
            temperature: 0.7,
            entropy: true,
        };
        let gradients = |policy: &dyn Policy| {
            let out = policy.logprobs(&three_answers(), &options).unwrap();
            let sum =
                out.logprobs.square().sum(Kind::Float) + out.entropy.unwrap().sum(Kind::Float);
            sum.backward();
            let weights = policy.named_parameters();
            weights
                .into_iter()
                .map(|(n, w)| (n, w.grad()))
                .collect::<Vec<_>>()
        };
        let packed = gradients(&load(model_dir(name)).unwrap());
        let padded = gradients(&Padded(load(model_dir(name)).unwrap()));
        for ((name, a), (_, b)) in packed.iter().zip(&padded) {
            assert!(a.defined() && b.defined(), "{name}");
            let scale = b.abs().max().double_value(&[]).max(1.0);
            assert_close(name, a, b, 1e-5 * scale);
        }
    }
}

#[test]
fn batches_that_do_not_fit_are_errors() {
    let model = load(model_dir("gpt2")).unwrap(); // 768 ids, 64 positions
    let logprobs = |prompt: Vec<i64>, response: Vec<i64>| {
        let batch = SequenceBatch::new(vec![Sequence::new(prompt, response)]).unwrap();
        model.logprobs(&batch, &LogprobOptions::default())
    };
    let error = logprobs(vec![1], vec![768]).unwrap_err();
    assert!(
        matches!(error, CoreError::TokenOutOfRange { .. }),
        "{error}"
    );
    let error = logprobs(vec![1; 64], vec![2]).unwrap_err();
    assert!(matches!(error, CoreError::TooLong { .. }), "{error}");
    let none = logprobs(vec![1, 2], vec![]).unwrap();
    assert_eq!(none.logprobs.size(), [1, 0]);
}

#[test]
fn models_can_be_sent() {
    fn send<T: Send>() {}
    send::<CausalLm>();
    send::<SequenceClassifier>();
    send::<rlhf_models::ValueHeadModel>();
    send::<rlhf_models::Tokenizer>();
}

#[test]
fn configs_are_checked_where_they_enter() {
    let [
        ModelConfig::Gpt2(mut gpt2),
        ModelConfig::Llama(mut llama),
        ..,
    ] = small()
    else {
        panic!("one of each")
    };
    gpt2.n_head = 5;
    llama.transformer.num_key_value_heads = 0;
    for (config, name) in [
        (ModelConfig::Gpt2(gpt2), "n_head"),
        (ModelConfig::Llama(llama), "num_key_value_heads"),
    ] {
        let error = CausalLm::new(config, 1, Device::Cpu, Kind::Float)
            .err()
            .unwrap();
        assert!(
            matches!(&error, Error::Core(CoreError::InvalidConfig { field, .. }) if *field == name),
            "{error}"
        );
    }
}

#[test]
fn sixteen_bit_models_compute_and_train() {
    for config in small() {
        let new = |kind| CausalLm::new(config.clone(), 1, Device::Cpu, kind).unwrap();
        let model = new(Kind::BFloat16);
        let got = logprobs(&model);
        assert_eq!(got.kind(), Kind::Float);
        assert_close("log-probs", &got, &logprobs(&new(Kind::Float)), 0.05);
        got.sum(Kind::Float).backward();
        for (name, weight) in model.named_parameters() {
            assert_eq!(weight.grad().kind(), Kind::BFloat16, "{name}");
            assert!(
                bool::try_from(weight.grad().isfinite().all()).unwrap(),
                "{name}"
            );
        }
    }
}
