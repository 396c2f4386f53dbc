//! LoRA: what PEFT computes, on frozen weights that are never copied.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::{Case, adapter_dir, assert_close, model_dir};
use rlhf_models::core::{
    LogprobOptions, PaddingSide, Parameters, Policy, Scorer, Sequence, SequenceBatch, ValueModel,
};
use rlhf_models::tch::{self, Device, Kind, Tensor};
use rlhf_models::{
    AdapterProblem, CausalLm, Error, LoadOptions, LoraConfig, Modules, SequenceClassifier,
    ValueHeadModel, WeightProblem,
};

const ADAPTERS: [(&str, &str); 3] = [
    ("llama_qv", "llama"),
    ("llama_all_rslora", "llama"),
    ("gpt2_attn_mlp", "gpt2"),
];

fn load(name: &str) -> CausalLm {
    CausalLm::from_pretrained(model_dir(name), &LoadOptions::default()).unwrap()
}

fn adapted(adapter: &str, model: &str) -> CausalLm {
    let mut model = load(model);
    model.load_adapter(adapter_dir(adapter)).unwrap();
    model
}

fn batch() -> SequenceBatch {
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 8]),
        Sequence::new([7], [1, 1, 4, 20, 6]),
    ])
    .unwrap()
}

fn logprobs(model: &CausalLm) -> Tensor {
    let scores = model.logprobs(&batch(), &LogprobOptions::default());
    scores.unwrap().logprobs
}

fn case_logits(model: &CausalLm, case: &Case) -> Tensor {
    let rows = case.rows("input_ids").into_iter();
    let sequences = rows.map(|row| Sequence::new(row, [])).collect();
    let batch = SequenceBatch::new(sequences).unwrap();
    let padded = batch.padded(0, PaddingSide::Right, Device::Cpu);
    let logits = model.logits(&padded).unwrap();
    logits.narrow(1, logits.size()[1] - 3, 3)
}

/// Moves every trained weight a little.
fn train(model: &impl Parameters) {
    let _guard = tch::no_grad_guard();
    for (_, mut weight) in model.named_parameters() {
        let _ = weight.f_add_scalar_(0.01).unwrap();
    }
}

#[test]
fn logits_and_merged_weights_are_those_of_peft() {
    for (adapter, model) in ADAPTERS {
        let case = Case::read(&format!("lora/{adapter}"));
        let mut model = adapted(adapter, model);
        let tolerance = case.tolerance("logits_abs");
        let want = case.tensor("logits_adapter");
        assert_close(adapter, &case_logits(&model, &case), want, tolerance);

        model.merge().unwrap();
        assert!(model.adapter().is_none() && model.named_parameters().is_empty());
        assert_close(adapter, &case_logits(&model, &case), want, tolerance);
        model.set_trainable(true);
        let mut merged = 0;
        for (name, weight) in model.named_parameters() {
            if case.has(&format!("merged/{name}")) {
                let want = case.tensor(&format!("merged/{name}"));
                let tolerance = case.tolerance("merged_abs");
                assert_close(&name, &weight, want, tolerance);
                merged += 1;
            }
        }
        assert_eq!(merged, 3);
    }
}

#[test]
fn what_is_saved_whole_is_the_merged_model() {
    for (adapter, name) in ADAPTERS {
        let case = Case::read(&format!("lora/{adapter}"));
        let mut model = adapted(adapter, name);
        let dir = tempfile::tempdir().unwrap();
        model.save_pretrained(dir.path()).unwrap();
        assert!(model.adapter().is_some(), "saving changes nothing");
        let plain = CausalLm::from_pretrained(dir.path(), &LoadOptions::default()).unwrap();
        model.merge().unwrap();
        assert_eq!(
            case_logits(&plain, &case),
            case_logits(&model, &case),
            "{adapter}"
        );
    }
}

#[test]
fn adapters_are_read_back_bit_for_bit() {
    for (adapter, name) in ADAPTERS {
        let model = adapted(adapter, name);
        train(&model);
        let dir = tempfile::tempdir().unwrap();
        model.save_adapter(dir.path()).unwrap();
        let mut again = load(name);
        again.load_adapter(dir.path()).unwrap();
        assert_eq!(again.adapter(), model.adapter());
        assert_eq!(logprobs(&again), logprobs(&model), "{adapter}");
        let names = |model: &CausalLm| {
            let parameters = model.named_parameters();
            parameters.into_iter().map(|(n, _)| n).collect::<Vec<_>>()
        };
        assert_eq!(names(&again), names(&model));
        let mut files: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
    }
}

#[test]
fn the_written_config_is_what_peft_would_write() {
    for (adapter, name) in ADAPTERS {
        let dir = tempfile::tempdir().unwrap();
        adapted(adapter, name).save_adapter(dir.path()).unwrap();
        let read = |dir: PathBuf| -> serde_json::Map<String, serde_json::Value> {
            let bytes = std::fs::read(dir.join("adapter_config.json")).unwrap();
            serde_json::from_slice(&bytes).unwrap()
        };
        let (ours, theirs) = (read(dir.path().into()), read(adapter_dir(adapter)));
        for (field, value) in ours {
            let known = theirs.get(&field);
            let known = known.unwrap_or_else(|| panic!("PEFT has no field {field}"));
            let off = [serde_json::json!({}), serde_json::Value::Null];
            let both_off = off.contains(&value) && off.contains(known);
            assert!(value == *known || both_off, "{adapter}: {field}");
        }
        let names = |dir: PathBuf| {
            let path = dir.join("adapter_model.safetensors");
            let tensors = Tensor::read_safetensors(path).unwrap();
            let mut names: Vec<_> = tensors.into_iter().map(|(name, _)| name).collect();
            names.sort();
            names
        };
        assert_eq!(names(dir.path().into()), names(adapter_dir(adapter)));
    }
}

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
fn a_reference_shares_memory_and_does_not_move() {
    for (adapter, name) in ADAPTERS {
        let plain = logprobs(&load(name));
        let model = adapted(adapter, name);
        let (mut reference, snapshot) = (model.reference().unwrap(), model.snapshot().unwrap());
        let before = logprobs(&model);
        assert!(logprobs(&reference).equal(&plain) && logprobs(&snapshot).equal(&before));
        assert!(!before.equal(&plain));
        assert!(reference.named_parameters().is_empty());
        assert!(snapshot.named_parameters().is_empty());

        train(&model);
        assert!(!logprobs(&model).equal(&before));
        assert!(logprobs(&reference).equal(&plain) && logprobs(&snapshot).equal(&before));

        // The same memory: zeros written through one are read by the others.
        reference.set_trainable(true);
        assert!(
            model
                .named_parameters()
                .iter()
                .all(|(_, w)| w.requires_grad())
        );
        let _guard = tch::no_grad_guard();
        for (_, mut weight) in reference.named_parameters() {
            let _ = weight.zero_();
        }
        let flat = plain.zeros_like();
        let uniform = |model: &CausalLm| {
            let spread = logprobs(model).masked_select(&plain.ne_tensor(&flat));
            (spread.max() - spread.min()).double_value(&[])
        };
        assert!(uniform(&model) == 0.0 && uniform(&snapshot) == 0.0);
    }
}

#[test]
fn a_reference_goes_to_another_thread() {
    let model = adapted("llama_qv", "llama");
    let reference = model.reference().unwrap();
    let expected = logprobs(&reference);
    let theirs = std::thread::spawn(move || logprobs(&reference));
    logprobs(&model).sum(Kind::Float).backward();
    assert!(theirs.join().unwrap().equal(&expected));
}

#[test]
fn a_frozen_head_takes_the_path_that_computes_nothing_twice() {
    // That path makes the gradients in forward, so backward does not look at the head: a change
    // in between, which backward would refuse, goes unnoticed.
    let backward = |model: &CausalLm, head: &mut Tensor| {
        let loss = logprobs(model).sum(Kind::Float);
        {
            let _guard = tch::no_grad_guard();
            let _ = head.f_mul_scalar_(1.0).unwrap();
        }
        loss.f_backward()
    };
    let head = |mut model: CausalLm| {
        model.set_trainable(true);
        let mut parameters = model.named_parameters().into_iter();
        parameters.find(|(n, _)| n == "lm_head.weight").unwrap().1
    };
    let trained = load("llama_rope3");
    let alias = trained.named_parameters();
    let mut alias = alias
        .into_iter()
        .find(|(n, _)| n == "lm_head.weight")
        .unwrap()
        .1;
    assert!(backward(&trained, &mut alias).is_err());
    let mut model = load("llama_rope3");
    model.add_adapter(&LoraConfig::default(), 0).unwrap();
    let mut alias = head(model.reference().unwrap());
    backward(&model, &mut alias).unwrap();
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

#[test]
fn copies_share_nothing() {
    let model = adapted("llama_qv", "llama");
    let copy = model.try_clone().unwrap();
    let before = logprobs(&model);
    assert!(logprobs(&copy).equal(&before));
    assert_eq!(copy.adapter(), model.adapter());
    train(&model);
    assert!(logprobs(&copy).equal(&before));
    train(&copy);
    assert!(logprobs(&copy).equal(&logprobs(&model)));
    // A classifier made of it has the adapters in its weights.
    let classifier = SequenceClassifier::from_causal_lm(&model, 1, 0).unwrap();
    assert!(classifier.adapter().is_none());
    let mut merged = model.try_clone().unwrap();
    merged.merge().unwrap();
    let of_merged = SequenceClassifier::from_causal_lm(&merged, 1, 0).unwrap();
    let scores = |model: &SequenceClassifier| model.scores(&batch()).unwrap();
    assert!(scores(&classifier).equal(&scores(&of_merged)));
}

#[test]
fn a_classifier_trains_its_head_too() {
    for name in ["gpt2_rm", "llama_rm", "gpt2_cls2"] {
        let options = LoadOptions::default();
        let fresh = || SequenceClassifier::from_pretrained(model_dir(name), &options).unwrap();
        let scores = |model: &SequenceClassifier| model.scores(&batch()).unwrap();
        let mut model = fresh();
        let plain = scores(&model);
        model.add_adapter(&LoraConfig::default(), 0).unwrap();
        assert!(scores(&model).equal(&plain));
        let trained = model.named_parameters();
        let whole: Vec<_> = trained
            .iter()
            .filter(|(n, _)| !n.contains("lora_"))
            .collect();
        assert_eq!(whole.len(), 1);
        assert_eq!(whole[0].0, "score.weight");
        scores(&model).sum(Kind::Float).backward();
        assert!(whole[0].1.grad().norm().double_value(&[]) > 0.0);
        train(&model);
        let after = scores(&model);
        assert!(!after.equal(&plain));

        let dir = tempfile::tempdir().unwrap();
        model.save_adapter(dir.path().join("adapter")).unwrap();
        model.save_pretrained(dir.path().join("whole")).unwrap();
        let mut again = fresh();
        again.load_adapter(dir.path().join("adapter")).unwrap();
        assert!(scores(&again).equal(&after), "{name}");
        let whole = SequenceClassifier::from_pretrained(dir.path().join("whole"), &options);
        assert_close(name, &scores(&whole.unwrap()), &after, 1e-4);
        again.merge().unwrap();
        assert_close(name, &scores(&again), &after, 1e-4);
        // PEFT lists two names that a head may have.
        let path = dir.path().join("adapter/adapter_config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let listed = text.replacen("\"score\"", "\"classifier\", \"score\"", 1);
        assert_ne!(listed, text);
        std::fs::write(path, listed).unwrap();
        let mut again = fresh();
        again.load_adapter(dir.path().join("adapter")).unwrap();
        assert!(scores(&again).equal(&after), "{name}");
    }
}

#[test]
fn a_critic_on_the_policys_memory() {
    for name in ["gpt2", "llama"] {
        let mut policy = load(name);
        let config = LoraConfig::default();
        assert!(matches!(
            ValueHeadModel::on_base_of(&policy, &config, 5),
            Err(Error::NoAdapter)
        ));
        let copied = ValueHeadModel::from_causal_lm(&policy, 5).unwrap();
        policy.add_adapter(&config, 0).unwrap();
        let critic = ValueHeadModel::on_base_of(&policy, &config, 5).unwrap();
        let values = |model: &ValueHeadModel| model.values(&batch()).unwrap();
        let before = values(&critic);
        assert!(before.equal(&values(&copied)), "{name}");
        let trained = critic.named_parameters();
        assert!(trained.iter().any(|(name, _)| name == "score.weight"));
        let theirs = policy.named_parameters();
        let shared = trained
            .iter()
            .any(|(_, a)| theirs.iter().any(|(_, b)| a.data_ptr() == b.data_ptr()));
        assert!(!shared);
        train(&policy);
        assert!(values(&critic).equal(&before));
        let policys = logprobs(&policy);
        train(&critic);
        assert!(!values(&critic).equal(&before) && logprobs(&policy).equal(&policys));
        values(&critic).sum(Kind::Float).backward();
        assert!(trained.iter().all(|(_, weight)| weight.grad().defined()));

        let dir = tempfile::tempdir().unwrap();
        critic.save_pretrained(dir.path()).unwrap();
        let again = ValueHeadModel::from_pretrained(dir.path(), &LoadOptions::default()).unwrap();
        assert_close(name, &values(&again), &values(&critic), 1e-4);
    }
}

#[test]
fn modules_trained_whole() {
    for (name, modules, weights) in [
        ("gpt2", vec!["ln_f", "wte"], 3),
        ("llama_rope3", vec!["lm_head", "model.norm"], 2),
    ] {
        let mut model = load(name);
        let plain = logprobs(&model);
        let config = LoraConfig {
            modules_to_save: modules.into_iter().map(String::from).collect(),
            ..LoraConfig::default()
        };
        model.add_adapter(&config, 0).unwrap();
        assert!(logprobs(&model).equal(&plain));
        let trained = model.named_parameters();
        let whole = trained.iter().filter(|(n, _)| !n.contains("lora_"));
        assert_eq!(whole.count(), weights, "{name}");
        train(&model);
        assert!(logprobs(&model.reference().unwrap()).equal(&plain));
        let dir = tempfile::tempdir().unwrap();
        model.save_adapter(dir.path()).unwrap();
        let mut again = load(name);
        again.load_adapter(dir.path()).unwrap();
        assert!(logprobs(&again).equal(&logprobs(&model)));
        model.merge().unwrap();
        assert_close(name, &logprobs(&model), &logprobs(&again), 1e-4);
        // PEFT's default would leave the output layer as it was.
        if name == "gpt2" {
            let path = dir.path().join("adapter_config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            let untied = text.replace(
                "\"ensure_weight_tying\": true",
                "\"ensure_weight_tying\": false",
            );
            assert_ne!(untied, text);
            std::fs::write(path, untied).unwrap();
            let mut model = load(name);
            let error = model.load_adapter(dir.path()).unwrap_err().to_string();
            assert!(error.contains("ensure_weight_tying"), "{error}");
            assert!(model.adapter().is_none() && !model.named_parameters().is_empty());
        }
    }
}

#[test]
fn every_name_that_fits_nothing_is_listed() {
    let mut model = load("gpt2");
    let config = LoraConfig {
        target_modules: Modules::named(["q_proj", "c_attn", "v_proj"]),
        modules_to_save: vec!["lm_head".into()],
        ..LoraConfig::default()
    };
    let error = model.add_adapter(&config, 0).unwrap_err();
    let text = error.to_string();
    let Error::Adapter { problems, .. } = error else {
        panic!("{text}")
    };
    assert_eq!(problems.len(), 3, "{text}");
    for known in [
        "q_proj",
        "v_proj",
        "lm_head",
        "c_attn, c_fc, c_proj",
        "ln_f",
    ] {
        assert!(text.contains(known), "{text}");
    }
    assert!(model.adapter().is_none() && model.named_parameters().len() > 20);

    let nothing = LoraConfig {
        layers_to_transform: Some(vec![7]),
        ..LoraConfig::default()
    };
    let error = model.add_adapter(&nothing, 0).unwrap_err().to_string();
    assert!(error.contains("no linear layer is left"), "{error}");
    assert!(matches!(model.merge(), Err(Error::NoAdapter)));
    assert!(matches!(
        model.save_adapter("/nowhere"),
        Err(Error::NoAdapter)
    ));
    model.add_adapter(&LoraConfig::default(), 0).unwrap();
    let again = model.add_adapter(&LoraConfig::default(), 0);
    assert!(matches!(again, Err(Error::HasAdapter)));
}

#[test]
fn every_tensor_that_does_not_fit_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let source = adapter_dir("llama_qv");
    let config = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), &config).unwrap();
    let file = dir.path().join("adapter_model.safetensors");
    let layer = "base_model.model.model.layers.0.self_attn";
    let tensors: Vec<_> = Tensor::read_safetensors(source.join("adapter_model.safetensors"))
        .unwrap()
        .into_iter()
        .filter(|(name, _)| *name != format!("{layer}.q_proj.lora_A.weight"))
        .map(
            |(name, tensor)| match name == format!("{layer}.v_proj.lora_B.weight") {
                true => (name, tensor.narrow(0, 0, 3).copy()),
                false => (name, tensor),
            },
        )
        .chain([(
            "lm_head.lora_A.weight".into(),
            Tensor::zeros([4, 32], (Kind::Float, Device::Cpu)),
        )])
        .collect();
    Tensor::write_safetensors(&tensors, &file).unwrap();
    let mut model = load("llama");
    let error = model.load_adapter(dir.path()).unwrap_err();
    let text = error.to_string();
    let Error::Adapter { path, problems } = error else {
        panic!("{text}")
    };
    assert_eq!(path.as_deref(), Some(dir.path()));
    let weight = |problem: WeightProblem| AdapterProblem::Weight(problem);
    let own = "model.layers.0.self_attn";
    assert_eq!(
        problems,
        [
            weight(WeightProblem::Missing {
                name: format!("{own}.q_proj.lora_A.weight"),
                shape: vec![4, 32],
            }),
            weight(WeightProblem::Shape {
                name: format!("{own}.v_proj.lora_B.weight"),
                found: vec![3, 4],
                expected: vec![16, 4],
            }),
            weight(WeightProblem::Unexpected {
                name: "lm_head.lora_A.weight".into(),
                shape: vec![4, 32],
            }),
        ],
        "{text}"
    );
    assert!(model.adapter().is_none());

    for (spoilt, field) in [
        (
            config.replace("\"use_dora\": false", "\"use_dora\": true"),
            "use_dora",
        ),
        (config.replace("\"LORA\"", "\"IA3\""), "peft_type"),
        (
            config.replace("\"bias\": \"none\"", "\"bias\": \"all\""),
            "bias",
        ),
        (config.replace("\"r\": 4", "\"r\": 0"), "rank"),
        (
            config.replace(
                "\"init_lora_weights\": true",
                "\"init_lora_weights\": \"pissa\"",
            ),
            "init_lora_weights",
        ),
    ] {
        assert_ne!(spoilt, config);
        std::fs::write(dir.path().join("adapter_config.json"), spoilt).unwrap();
        let error = model.load_adapter(dir.path()).unwrap_err();
        assert!(matches!(error, Error::InvalidField { .. }), "{error}");
        assert!(error.to_string().contains(field), "{error}");
    }
    std::fs::write(dir.path().join("adapter_config.json"), &config).unwrap();
    for length in [0, 7, 100] {
        let bytes = std::fs::read(source.join("adapter_model.safetensors")).unwrap();
        std::fs::write(&file, &bytes[..length]).unwrap();
        model.load_adapter(dir.path()).unwrap_err();
    }
    model.load_adapter("/nowhere/adapter").unwrap_err();
}
