//! What is trained, in which architectures and kinds.

use super::*;

#[test]
fn fresh_adapters_change_nothing_and_are_all_that_is_trained() {
    for name in ["gpt2", "llama"] {
        let mut model = load(name);
        let before = logprobs(&model);
        model.add_adapter(&LoraConfig::default(), 3).unwrap();
        assert!(logprobs(&model).equal(&before));
        let trained = model.named_parameters();
        assert!(trained.iter().all(|(name, _)| name.contains(".lora_")));
        assert!(trained.is_sorted_by(|a, b| a.0 < b.0));
        // Two factors for 4 linear layers of GPT-2, 7 of Llama, in two blocks.
        assert_eq!(trained.len(), if name == "gpt2" { 16 } else { 28 });

        logprobs(&model).sum(Kind::Float).backward();
        for (name, weight) in &trained {
            let gradient = weight.grad();
            assert!(gradient.defined(), "{name}");
            let norm = gradient.norm().double_value(&[]);
            // B is zero, so nothing flows to A yet.
            assert_eq!(norm > 0.0, name.contains("lora_B"), "{name}");
            let (largest, size) = (weight.abs().max().double_value(&[]), weight.size());
            match name.contains("lora_A") {
                true => {
                    let bound = 1.0 / (size[1] as f64).sqrt();
                    assert!(largest <= bound && largest > 0.9 * bound, "{name}");
                    let deviation = weight.std(true).double_value(&[]);
                    assert!(
                        (deviation / (bound / 3f64.sqrt()) - 1.0).abs() < 0.2,
                        "{name}"
                    );
                }
                false => assert_eq!(largest, 0.0),
            }
        }
        let mut again = load(name);
        again.add_adapter(&LoraConfig::default(), 3).unwrap();
        let mut other = load(name);
        other.add_adapter(&LoraConfig::default(), 4).unwrap();
        for (i, (name, weight)) in trained.iter().enumerate() {
            assert!(weight.equal(&again.named_parameters()[i].1), "{name}");
            let differs = !weight.equal(&other.named_parameters()[i].1);
            assert_eq!(differs, name.contains("lora_A"));
        }
    }
}

#[test]
fn every_architecture_has_adapters() {
    // Linear layers in two blocks.
    for (name, layers) in [
        ("gpt_neox", 8),
        ("mistral", 14),
        ("qwen2", 14),
        ("qwen3", 14),
        ("gemma2", 14),
    ] {
        let mut model = load(name);
        let plain = logprobs(&model);
        model.add_adapter(&LoraConfig::default(), 0).unwrap();
        assert!(logprobs(&model).equal(&plain), "{name}");
        assert_eq!(model.named_parameters().len(), 2 * layers, "{name}");
        train(&model);
        let adapted = logprobs(&model);
        assert!(!adapted.equal(&plain), "{name}");
        assert!(
            logprobs(&model.reference().unwrap()).equal(&plain),
            "{name}"
        );
        model.merge().unwrap();
        assert_close(name, &logprobs(&model), &adapted, 1e-4);
    }
}

#[test]
fn a_16_bit_base_has_f32_adapters() {
    let options = LoadOptions {
        kind: Some(Kind::BFloat16),
        ..LoadOptions::default()
    };
    let wide = adapted("llama_all_rslora", "llama");
    let mut model = CausalLm::from_pretrained(model_dir("llama"), &options).unwrap();
    model.load_adapter(adapter_dir("llama_all_rslora")).unwrap();
    assert_eq!(model.kind(), Kind::BFloat16);
    let loss = logprobs(&model).sum(Kind::Float);
    loss.backward();
    let wide_loss = logprobs(&wide).sum(Kind::Float);
    wide_loss.backward();
    let parameters = model.named_parameters().into_iter();
    for ((name, weight), (_, wide)) in parameters.zip(wide.named_parameters()) {
        assert_eq!(weight.kind(), Kind::Float, "{name}");
        let (gradient, expected) = (weight.grad(), wide.grad());
        assert_eq!(gradient.kind(), Kind::Float);
        let error = (&gradient - &expected).norm() / expected.norm();
        assert!(error.double_value(&[]) < 0.1, "{name}: {error}");
    }
    assert_close("log-probs", &logprobs(&model), &logprobs(&wide), 0.3);
    let adapted = logprobs(&model);
    model.merge().unwrap();
    assert_eq!(model.kind(), Kind::BFloat16);
    assert_close("merged", &logprobs(&model), &adapted, 0.3);
}
