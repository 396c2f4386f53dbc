//! Kernels of our own keep less for backward than the memory plan counts, and never more.
#![allow(clippy::unwrap_used)]

use rlhf_core::{LogprobOptions, Policy, Sequence, SequenceBatch};
use rlhf_models::{
    BatchShape, CausalLm, Gpt2Config, LlamaConfig, MemoryOptions, ModelConfig, Qwen3Config,
    TransformerConfig,
};
use rlhf_scale::{kernels, measure_memory};
use tch::{Device, Kind, Tensor};

#[test]
fn what_is_kept_is_no_more_than_planned() {
    let transformer = TransformerConfig {
        vocab_size: 600,
        max_position_embeddings: 128,
        hidden_size: 64,
        intermediate_size: 176,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        ..TransformerConfig::default()
    };
    let gpt2 = Gpt2Config {
        vocab_size: 600,
        n_positions: 128,
        n_embd: 64,
        n_layer: 4,
        n_head: 4,
        ..Gpt2Config::default()
    };
    let llama = LlamaConfig {
        transformer: transformer.clone(),
        ..LlamaConfig::default()
    };
    let qwen3 = Qwen3Config {
        transformer,
        ..Qwen3Config::default()
    };
    let rows = (0..8i64).map(|i| Sequence::new(vec![i; 30], vec![1; 20 + i as usize]));
    let batch = SequenceBatch::new(rows.collect()).unwrap();
    let probe = Tensor::ones([1], (Kind::Float, Device::Cpu));
    let has_kernels = kernels::silu_gated(&probe, &probe).unwrap().is_some();
    for (config, share) in [
        (ModelConfig::Gpt2(gpt2), 1.0),
        (ModelConfig::Llama(llama), 0.85),
        (ModelConfig::Qwen3(qwen3), 0.85),
    ] {
        let model = CausalLm::new(config, 1, Device::Cpu, Kind::Float).unwrap();
        let options = MemoryOptions::of(&model);
        let plan = model.memory_plan(&BatchShape::from(&batch), &options);
        let planned = plan.unwrap().activations as f64;
        let (loss, memory) = measure_memory(|| {
            let scores = model.logprobs(&batch, &LogprobOptions::default()).unwrap();
            scores.logprobs.sum(Kind::Float)
        })
        .unwrap();
        drop(loss);
        // Beside activations there are ids, masks and states of random generators.
        let kept = memory.kept as f64 - 100.0 * 1024.0;
        let most = if has_kernels { share } else { 1.02 };
        assert!(kept <= most * planned, "{kept} of {planned}");
    }
}
