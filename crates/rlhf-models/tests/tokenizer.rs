//! Ids, texts and rendered conversations equal those of transformers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::{Case, model_dir};
use rlhf_models::core::Detokenize;
use rlhf_models::{ChatEnd, ChatMessage, ChatOptions, Error, ModelConfig, Side, Tokenizer};
use serde_json::Value;

fn dir(name: &str) -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/goldens/tokenizers"
    ))
    .join(name)
}

fn ids(value: &Value) -> Vec<i64> {
    serde_json::from_value(value.clone()).unwrap()
}

fn check(name: &str) {
    let case = Case::read(&format!("tokenizer/{name}"));
    let tokenizer = Tokenizer::from_dir(dir(name)).unwrap();
    let params = &case.json["params"];
    for (key, id) in [
        ("bos_token_id", tokenizer.bos_token_id()),
        ("eos_token_id", tokenizer.eos_token_id()),
        ("pad_token_id", tokenizer.pad_token_id()),
        ("vocab_size", Some(tokenizer.vocab_size() as i64)),
    ] {
        assert_eq!(params[key].as_i64(), id, "{key}");
    }
    for entry in case.json["expect"]["encode"].as_array().unwrap() {
        let text = entry["text"].as_str().unwrap();
        let plain = tokenizer.encode(text).unwrap();
        assert_eq!(plain, ids(&entry["ids_no_special"]), "{text:?}");
        let special = tokenizer.encode_with_special_tokens(text).unwrap();
        assert_eq!(special, ids(&entry["ids"]), "{text:?}");
        let decoded = |skip| tokenizer.decode(&plain, skip).unwrap();
        assert_eq!(decoded(false), entry["decode"].as_str().unwrap());
        assert_eq!(
            decoded(true),
            entry["decode_skip_special"].as_str().unwrap()
        );
        assert_eq!(tokenizer.detokenize(&plain).unwrap(), decoded(true));
    }
    let texts: Vec<&str> = case.json["expect"]["encode"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["text"].as_str().unwrap())
        .collect();
    let one_by_one: Vec<_> = texts.iter().map(|t| tokenizer.encode(t).unwrap()).collect();
    assert_eq!(tokenizer.encode_batch(&texts).unwrap(), one_by_one);
    let cut = &case.json["expect"]["truncate_max_length_5"];
    for (key, side) in [("right", Side::Right), ("left", Side::Left)] {
        let text = cut["text"].as_str().unwrap();
        let found = tokenizer.encode_truncated(text, 5, side).unwrap();
        assert_eq!(found, ids(&cut[key]), "{key}");
    }
    for chat in case.json["expect"]["chat"].as_array().unwrap() {
        let messages: Vec<ChatMessage> = serde_json::from_value(chat["messages"].clone()).unwrap();
        for (key, prompt) in [
            ("no_generation_prompt", ChatEnd::Closed),
            ("generation_prompt", ChatEnd::GenerationPrompt),
        ] {
            let text = tokenizer
                .apply_chat_template(&messages, &ChatOptions::ending(prompt))
                .unwrap();
            assert_eq!(text, chat[key]["text"].as_str().unwrap());
            assert_eq!(tokenizer.encode(&text).unwrap(), ids(&chat[key]["ids"]));
        }
    }
}

#[test]
fn chatml_with_its_template_in_a_file() {
    check("chatml");
}

#[test]
fn llama3_with_its_template_in_the_config() {
    check("llama3_style");
}

/// A copy of the ChatML tokenizer's folder, with other files in it.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::from_dir(dir("chatml"))
        .unwrap()
        .save(folder.path())
        .unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[test]
fn saved_files_are_the_ones_read() {
    let folder = folder(&[]);
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let read = |dir: PathBuf| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(read(folder.path().into()), read(dir("chatml")), "{name}");
    }
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 3, "a staged file is left over");
}

#[test]
fn stop_tokens_come_from_the_generation_config_too() {
    let stops = |files: &[(&str, &str)]| {
        let tokenizer = Tokenizer::from_dir(folder(files).path()).unwrap();
        tokenizer.stop_token_ids().to_vec()
    };
    assert_eq!(stops(&[]), [0]);
    let one = r#"{"eos_token_id": 3}"#;
    assert_eq!(stops(&[("generation_config.json", one)]), [0, 3]);
    let list = r#"{"eos_token_id": [3, 0, 4]}"#;
    assert_eq!(stops(&[("generation_config.json", list)]), [0, 3, 4]);
}

#[test]
fn special_tokens_of_old_folders() {
    let ids = |files: &[(&str, &str)]| {
        let tokenizer = Tokenizer::from_dir(folder(files).path()).unwrap();
        (tokenizer.bos_token_id(), tokenizer.eos_token_id())
    };
    let none = ("tokenizer_config.json", "{}");
    assert_eq!(ids(&[none]), (None, None));
    let map = r#"{"eos_token": {"content": "<|pad|>", "lstrip": false}}"#;
    let model = r#"{"bos_token_id": 0, "eos_token_id": 0}"#;
    let files = [
        none,
        ("special_tokens_map.json", map),
        ("config.json", model),
    ];
    assert_eq!(ids(&files), (Some(0), Some(1)));
}

#[test]
fn a_tokenizer_must_fit_its_model() {
    let tokenizer = Tokenizer::from_dir(dir("chatml")).unwrap();
    let mut config = ModelConfig::from_dir(model_dir("gpt2")).unwrap();
    tokenizer.check_fits(&config).unwrap();
    let ModelConfig::Gpt2(gpt2) = &mut config else {
        panic!("gpt2 expected")
    };
    gpt2.vocab_size = 767;
    let error = tokenizer.check_fits(&config).unwrap_err();
    assert!(
        matches!(
            error,
            Error::VocabularyTooSmall {
                largest_id: 767,
                vocab_size: 767
            }
        ),
        "{error}"
    );
}

#[test]
fn files_that_are_no_tokenizer_are_errors() {
    let load = |files: &[(&str, &str)]| Tokenizer::from_dir(folder(files).path()).err().unwrap();
    let error = load(&[("tokenizer.json", "{\"version\":")]);
    assert!(matches!(error, Error::Tokenizer { .. }), "{error}");
    let error = load(&[("tokenizer_config.json", "[]")]);
    assert!(matches!(error, Error::Json { .. }), "{error}");
    let error = load(&[("chat_template.jinja", "{% for %}")]);
    assert!(matches!(error, Error::ChatTemplate { .. }), "{error}");
    let error = Tokenizer::from_dir("/nowhere").err().unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn templates_may_refuse_and_may_be_absent() {
    let refusing = "{{ raise_exception('no system turn') }}";
    let files = folder(&[("chat_template.jinja", refusing)]);
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    let messages = [ChatMessage::new("user", "Hello")];
    let error = tokenizer
        .apply_chat_template(&messages, &ChatOptions::ending(ChatEnd::GenerationPrompt))
        .unwrap_err();
    assert!(error.to_string().contains("no system turn"), "{error}");
    // Methods of Python strings work.
    let python = "{{ messages[0]['content'].strip().upper() }}";
    let files = folder(&[("chat_template.jinja", python)]);
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    let messages = [ChatMessage::new("user", "  Hello ")];
    let text = tokenizer
        .apply_chat_template(&messages, &ChatOptions::ending(ChatEnd::GenerationPrompt))
        .unwrap();
    assert_eq!(text, "HELLO");
    std::fs::remove_file(files.path().join("chat_template.jinja")).unwrap();
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    let error = tokenizer
        .apply_chat_template(&messages, &ChatOptions::ending(ChatEnd::GenerationPrompt))
        .unwrap_err();
    assert!(matches!(error, Error::NoChatTemplate), "{error}");
}

#[test]
fn ids_without_a_token() {
    let tokenizer = Tokenizer::from_dir(dir("chatml")).unwrap();
    assert_eq!(tokenizer.decode(&[36, 90_000], true).unwrap(), "A");
    let error = tokenizer.decode(&[-1], true).unwrap_err();
    assert!(matches!(error, Error::InvalidId { id: -1 }), "{error}");
}
