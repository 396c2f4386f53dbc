//! What does not fit, by name.

use super::*;

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
