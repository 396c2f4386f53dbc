//! Kernels of our own keep less for backward than libtorch's operations, and the memory plan knows which of them run.
#![allow(clippy::unwrap_used)]

use rlhf_core::{LogprobOptions, Policy, Sequence, SequenceBatch};
use rlhf_models::{
    BatchShape, CausalLm, Gpt2Config, LlamaConfig, MemoryOptions, ModelConfig, Qwen3Config,
    TransformerConfig,
};
use rlhf_scale::{kernels, measure_memory};
use tch::{Device, Kind};

#[test]
fn what_is_kept_is_as_planned_with_and_without_them() {
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
    for (config, rms) in [
        (ModelConfig::Gpt2(gpt2), false),
        (ModelConfig::Llama(llama), true),
        (ModelConfig::Qwen3(qwen3), true),
    ] {
        let model = CausalLm::new(config, 1, Device::Cpu, Kind::Float).unwrap();
        let options = MemoryOptions::of(&model);
        let planned_and_kept = |training: bool| {
            kernels::set_training(training);
            let plan = model.memory_plan(&BatchShape::from(&batch), &options);
            let (loss, memory) = measure_memory(|| {
                let scores = model.logprobs(&batch, &LogprobOptions::default()).unwrap();
                scores.logprobs.sum(Kind::Float)
            })
            .unwrap();
            drop(loss);
            // Beside activations there are ids, masks and states of random generators.
            let kept = memory.kept as f64 - 100.0 * 1024.0;
            let planned = plan.unwrap().activations as f64;
            assert!((kept / planned - 1.0).abs() < 0.1, "{kept} of {planned}");
            planned
        };
        let (without, with) = (planned_and_kept(false), planned_and_kept(true));
        let less = with < 0.85 * without;
        assert_eq!(
            less,
            rms && kernels::multiplies(Kind::Float),
            "{with} of {without}"
        );
    }
}
