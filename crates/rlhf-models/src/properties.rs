//! What no file may do, whatever is in it: panic, or be read outside its folder.

use std::path::{Component, Path};

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::ModelConfig;
use crate::checkpoint::{Reading, parse, read_weights, shards};
use crate::config::Fields;

/// Bytes put in other bytes' places, and a cut.
type Edits = (Vec<(prop::sample::Index, u8)>, Option<prop::sample::Index>);

fn edits() -> impl Strategy<Value = Edits> {
    let edit = (any::<prop::sample::Index>(), any::<u8>());
    (
        vec(edit, 0..6),
        proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    )
}

fn edited(mut bytes: Vec<u8>, (edits, cut): &Edits) -> Vec<u8> {
    for (index, byte) in edits {
        let at = index.index(bytes.len());
        bytes[at] = *byte;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len()));
    }
    bytes
}

/// JSON of any form, with numbers that configurations do not expect.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
        Just(json!("sliding_attention")),
        Just(json!("yarn")),
        Just(json!("dynamic")),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        let key = prop_oneof![
            Just("rope_type".to_string()),
            Just("factor".to_string()),
            Just("original_max_position_embeddings".to_string()),
            "[a-z_]{0,8}",
        ];
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Value::from),
            vec((key, inner), 0..5).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

const CONFIGS: [&str; 7] = [
    include_str!("../../../tests/goldens/models/gemma2/config.json"),
    include_str!("../../../tests/goldens/models/gpt2/config.json"),
    include_str!("../../../tests/goldens/models/gpt_neox/config.json"),
    include_str!("../../../tests/goldens/models/llama_rope3/config.json"),
    include_str!("../../../tests/goldens/models/mistral/config.json"),
    include_str!("../../../tests/goldens/models/qwen2/config.json"),
    include_str!("../../../tests/goldens/models/qwen3/config.json"),
];

/// The config of these bytes, and what is asked of it before weights are read.
fn read_config(bytes: &[u8]) {
    let Ok(fields) = Fields::parse(Path::new("config.json"), bytes) else {
        return;
    };
    if let Ok(config) = ModelConfig::from_fields(&fields) {
        assert!(config.validate().is_ok());
        assert!(config.max_length() >= 1 && config.layers() <= 4096);
        assert!(config.vocab_size() >= 1 && config.hidden_size() >= 1);
    }
}

/// A file with two tensors.
fn safetensors() -> Vec<u8> {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.bias": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    })
    .to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([1; 34]);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn configs_of_any_bytes(bytes in vec(any::<u8>(), 0..200)) {
        read_config(&bytes);
    }

    #[test]
    fn damaged_configs(which in 0..CONFIGS.len(), edits in edits()) {
        read_config(&edited(CONFIGS[which].into(), &edits));
    }

    #[test]
    fn configs_with_any_values(
        which in 0..CONFIGS.len(),
        changes in vec((any::<prop::sample::Index>(), any_json()), 1..4),
        rope in proptest::option::of(any_json()),
    ) {
        let mut config: Map<String, Value> = serde_json::from_str(CONFIGS[which]).unwrap_or_default();
        let names: Vec<String> = config.keys().cloned().collect();
        for (index, value) in changes {
            config.insert(index.get(&names).clone(), value);
        }
        if let Some(rope) = rope {
            config.insert("rope_scaling".into(), rope);
        }
        read_config(Value::Object(config).to_string().as_bytes());
    }

    #[test]
    fn an_index_names_files_beside_it_alone(
        names in vec("(\\.{0,2}/?){0,3}[a-z]{0,3}(/|\\\\)?[a-z.]{0,3}", 1..4),
    ) {
        let map: Map<String, Value> = names
            .iter()
            .enumerate()
            .map(|(i, name)| (i.to_string(), json!(name)))
            .collect();
        let text = json!({ "weight_map": map }).to_string();
        let index = Fields::parse(Path::new("index.json"), text.as_bytes());
        if let Ok(Ok(files)) = index.map(|index| shards(&index)) {
            for file in files {
                let parts: Vec<_> = Path::new(&file).components().collect();
                prop_assert!(matches!(parts.as_slice(), [Component::Normal(_)]), "{file}");
            }
        }
    }

    #[test]
    fn damaged_indices(bytes in vec(any::<u8>(), 0..100), edits in edits()) {
        let text = br#"{"metadata": {"total_size": 9}, "weight_map": {"a": "b.safetensors"}}"#;
        for bytes in [bytes, edited(text.to_vec(), &edits)] {
            if let Ok(index) = Fields::parse(Path::new("index.json"), &bytes) {
                let _ = shards(&index);
            }
        }
    }

    #[test]
    fn headers_of_any_bytes(length in any::<u64>(), bytes in vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
        for length in [length, length % 200] {
            let mut with_length = length.to_le_bytes().to_vec();
            with_length.extend(&bytes);
            let _ = parse(&with_length);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// All the way to tensors.
    #[test]
    fn damaged_weights(edits in edits(), numbers in vec(any::<u64>(), 3), raw in any::<bool>()) {
        let Ok(dir) = tempfile::tempdir() else { return Ok(()) };
        let mut bytes = edited(safetensors(), &edits);
        if raw {
            // A header that is JSON all the same.
            let (shape, start, end) = (numbers[0] >> 40, numbers[1] % 40, numbers[2] % 40);
            let header = json!({
                "a": {"dtype": "F32", "shape": [numbers[0], 0], "data_offsets": [0, 0]},
                "b": {"dtype": "F16", "shape": [shape % 9, 2], "data_offsets": [start, end]},
            })
            .to_string();
            bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([1; 36]);
        }
        if std::fs::write(dir.path().join("model.safetensors"), bytes).is_ok()
            && let Ok(weights) = read_weights(dir.path(), Reading::Whole)
        {
            for tensor in weights.values() {
                prop_assert!(tensor.numel() <= 1000);
            }
        }
    }
}
