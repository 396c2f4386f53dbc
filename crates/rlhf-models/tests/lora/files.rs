//! Adapters on disk, as PEFT has them.

use super::*;

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
