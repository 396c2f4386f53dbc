//! Folders made to do harm end in a typed error, soon and in little memory. What random bytes do is
//! tested beside the parsers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::model_dir;
use rlhf_models::tch::{Device, Kind};
use rlhf_models::{CausalLm, Error, Gpt2Config, LoadOptions, ModelConfig, SequenceClassifier};
use serde_json::{Map, Value, json};

fn load(dir: &Path) -> Result<CausalLm, Error> {
    CausalLm::from_pretrained(dir, &LoadOptions::default())
}

fn folder(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model_dir(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn with_header(header: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn assert_refused(what: &str, folder: &Path) -> Error {
    let start = Instant::now();
    let error = load(folder)
        .err()
        .unwrap_or_else(|| panic!("{what} is loaded"));
    assert!(start.elapsed() < Duration::from_secs(5), "{what}: {error}");
    error
}

#[test]
fn headers_that_lie() {
    let tensor =
        |start: u64, end: u64| json!({"dtype": "F32", "shape": [2], "data_offsets": [start, end]});
    let two = |a: Value, b: Value| with_header(json!({"a": a, "b": b}).to_string().as_bytes(), 16);
    let shaped = |shape: Value| {
        let header = json!({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}});
        with_header(header.to_string().as_bytes(), 16)
    };
    let deep = format!("{}{}", r#"{"a":"#.repeat(50_000), "1");
    let empty: String = (0..700_000)
        .map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},"#))
        .collect();
    let many = format!("{{{}}}", empty.trim_end_matches(','));
    assert!(many.len() > 32 << 20);
    for (what, bytes) in [
        ("a header of all there is", u64::MAX.to_le_bytes().to_vec()),
        ("a header longer than the file", {
            let mut bytes = (1u64 << 24).to_le_bytes().to_vec();
            bytes.extend(b"{}");
            bytes
        }),
        ("overlapping tensors", two(tensor(0, 8), tensor(4, 12))),
        ("the same bytes twice", two(tensor(0, 8), tensor(0, 8))),
        ("a gap", two(tensor(0, 8), tensor(12, 16))),
        ("bytes after the end", two(tensor(0, 8), tensor(8, 1 << 40))),
        ("an end before its start", two(tensor(0, 8), tensor(16, 8))),
        ("a shape that overflows", shaped(json!([u64::MAX, 4]))),
        (
            "a product that wraps to 4",
            shaped(json!([(1u64 << 63) + 2, 2])),
        ),
        ("a negative shape", shaped(json!([-2, -2]))),
        ("deep nesting", with_header(deep.as_bytes(), 0)),
        (
            "a header of 700,000 tensors",
            with_header(many.as_bytes(), 0),
        ),
    ] {
        let folder = folder("gpt2");
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let error = assert_refused(what, folder.path());
        assert!(
            matches!(error, Error::Safetensors { .. }),
            "{what}: {error}"
        );
    }
}

#[test]
fn empty_tensors_of_huge_shapes_fit_nothing() {
    let folder = folder("gpt2");
    let shape = json!([i64::MAX, 0, i64::MAX]);
    let header = json!({"wte.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}});
    let bytes = with_header(header.to_string().as_bytes(), 0);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    assert_refused("a huge empty tensor", folder.path());
}

/// More than a process can address, whatever the machine has.
#[test]
fn a_model_that_fits_no_memory_is_an_error() {
    for (vocab_size, init) in [(1 << 28, "wte"), (1, "wpe")] {
        let config = Gpt2Config {
            vocab_size,
            n_embd: 1 << 20,
            n_positions: 1 << 28,
            n_layer: 1,
            n_head: 1,
            ..Gpt2Config::default()
        };
        let start = Instant::now();
        let made = CausalLm::new(ModelConfig::Gpt2(config), 0, Device::Cpu, Kind::Float);
        let error = made.err().expect("a petabyte was allocated").to_string();
        assert!(error.contains("not enough memory for"), "{error}");
        assert!(error.contains(init), "{error}");
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn files_that_are_not_small_or_no_files() {
    for file in ["config.json", "model.safetensors.index.json"] {
        let folder = folder("gpt2");
        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let path = folder.path().join(file);
        let sparse = std::fs::File::create(&path).unwrap();
        sparse.set_len(1 << 36).unwrap();
        let error = assert_refused("64 GiB of JSON", folder.path());
        assert!(matches!(error, Error::FileTooLarge { .. }), "{error}");
        let deep = format!("{}1{}", r#"{"a":["#.repeat(100_000), "]}".repeat(100_000));
        std::fs::write(&path, deep).unwrap();
        let error = assert_refused("deep nesting", folder.path());
        assert!(matches!(error, Error::Json { .. }), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let error = assert_refused("a folder", folder.path());
        assert!(matches!(error, Error::NotAFile { .. }), "{error}");
        #[cfg(unix)]
        {
            std::fs::remove_dir(&path).unwrap();
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            let error = assert_refused("a device", folder.path());
            assert!(matches!(error, Error::NotAFile { .. }), "{error}");
        }
    }
    let folder = folder("gpt2");
    let file = std::fs::File::create(folder.path().join("model.safetensors")).unwrap();
    file.set_len(1 << 36).unwrap();
    let error = assert_refused("64 GiB of zeros", folder.path());
    assert!(
        matches!(error, Error::Safetensors { .. } | Error::Io { .. }),
        "{error}"
    );
}

/// Most memory that this process has had, in bytes.
#[cfg(target_os = "linux")]
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib << 10
}

/// Every field of every architecture's config, with every value that it should not have.
#[test]
fn fields_of_any_value() {
    let hostile = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(7),
        json!(1_000_000_000_000_000_000i64),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e18),
        json!(0.5),
        json!(1e308),
        json!("x"),
        json!([]),
        json!([1, 2, 3]),
        json!(["sliding_attention", "full_attention", "sliding_attention"]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 1e300}),
        json!({"rope_type": "yarn", "factor": -1, "original_max_position_embeddings": 0}),
        json!({"rope_type": "dynamic", "factor": 1e18}),
        json!({"rope_type": "llama3", "factor": 0, "low_freq_factor": 0, "high_freq_factor": 0}),
        json!({"rope_type": ["linear"], "factor": "4"}),
    ];
    #[cfg(target_os = "linux")]
    let before = peak();
    let start = Instant::now();
    let (mut refused, mut tried) = (0, 0);
    for name in [
        "gemma2",
        "gpt2",
        "gpt_neox",
        "llama_rope3",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen2_rm",
    ] {
        let folder = folder(name);
        let path = folder.path().join("config.json");
        let config: Map<String, Value> =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut fields: Vec<&str> = config.keys().map(String::as_str).collect();
        fields.extend([
            "num_labels",
            "rope_scaling",
            "rope_parameters",
            "sliding_window",
        ]);
        for field in fields {
            for value in &hostile {
                let mut changed = config.clone();
                changed.insert(field.into(), value.clone());
                std::fs::write(&path, Value::Object(changed).to_string()).unwrap();
                let options = LoadOptions::default();
                let outcome = match name {
                    "qwen2_rm" => {
                        SequenceClassifier::from_pretrained(folder.path(), &options).err()
                    }
                    _ => CausalLm::from_pretrained(folder.path(), &options).err(),
                };
                tried += 1;
                if let Some(error) = outcome {
                    refused += 1;
                    assert!(
                        error.to_string().len() < 1 << 20,
                        "{name}, {field}: {value}"
                    );
                }
            }
        }
    }
    assert!(refused > 1000 && tried > 3000, "{refused} of {tried}");
    assert!(start.elapsed() < Duration::from_secs(120));
    #[cfg(target_os = "linux")]
    {
        let grown = peak() - before;
        assert!(grown < 256 << 20, "{} MiB more", grown >> 20);
    }
}
