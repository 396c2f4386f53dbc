//! Models whose head is trained beside the adapters.

use super::*;

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
