//! Conversations become the texts that transformers makes of them. `tests/goldens/chat/make.py`
//! made the reference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant, SystemTime};

use rlhf_models::{ChatEnd, ChatMessage, ChatOptions, Error, Tokenizer};
use serde_json::{Map, Value, json};

const TOKENIZERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/tokenizers");
const REFERENCE: &str = include_str!("goldens/chat/templates.json");

/// The ChatML tokenizer with another template, given to it as a folder's files.
fn with_files(files: &[(&str, &str)]) -> Result<Tokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    let from = format!("{TOKENIZERS}/chatml/tokenizer.json");
    std::fs::copy(from, folder.path().join("tokenizer.json")).unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    Tokenizer::from_dir(folder.path())
}

fn with_template(template: &str) -> Tokenizer {
    let config = r#"{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}"#;
    with_files(&[
        ("tokenizer_config.json", config),
        ("chat_template.jinja", template),
    ])
    .unwrap()
}

fn end(name: &str) -> ChatEnd {
    match name {
        "closed" => ChatEnd::Closed,
        "generation_prompt" => ChatEnd::GenerationPrompt,
        "open_final_message" => ChatEnd::OpenFinalMessage,
        other => panic!("{other}"),
    }
}

#[test]
fn as_transformers_renders_them() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    let (mut texts, mut errors) = (0, 0);
    let mut wrong = Vec::new();
    for (name, template) in reference["templates"].as_object().unwrap() {
        let tokenizer = with_template(template.as_str().unwrap());
        let cases = reference["cases"].as_array().unwrap();
        for case in cases.iter().filter(|case| case["template"] == *name) {
            let messages: Vec<ChatMessage> =
                serde_json::from_value(case["messages"].clone()).unwrap();
            let mut variables = case["arguments"].as_object().unwrap().clone();
            let mut list = |name| match variables.shift_remove(name) {
                Some(Value::Array(list)) => list,
                _ => Vec::new(),
            };
            let options = ChatOptions {
                end: end(case["end"].as_str().unwrap()),
                tools: list("tools"),
                documents: list("documents"),
                variables,
                ..ChatOptions::default()
            };
            let what = format!("{name}, {}: {}", case["end"], case["messages"]);
            match (
                tokenizer.apply_chat_template(&messages, &options),
                case["text"].as_str(),
            ) {
                (Ok(text), Some(expected)) if text == expected => texts += 1,
                (Err(_), None) => errors += 1,
                (found, expected) => {
                    wrong.push(format!(
                        "{what}\n  found    {found:?}\n  expected {expected:?}"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!((texts, errors), (85, 14));
}

#[test]
fn a_refusal_is_an_error_with_the_templates_words() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    let tokenizer = with_template(reference["templates"]["gemma2"].as_str().unwrap());
    let messages = [
        ChatMessage::new("system", "s"),
        ChatMessage::new("user", "u"),
    ];
    let error = tokenizer
        .apply_chat_template(&messages, &ChatOptions::default())
        .unwrap_err();
    assert!(
        error.to_string().contains("there is no system role"),
        "{error}"
    );
}

#[test]
fn bos_and_eos_are_placed_as_the_config_says() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    for case in reference["post_processor"].as_array().unwrap() {
        let from = format!("{TOKENIZERS}/{}", case["folder"].as_str().unwrap());
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let path = folder.path().join("tokenizer_config.json");
        let mut config: Map<String, Value> =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config.extend(case["flags"].as_object().unwrap().clone());
        std::fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let ids = tokenizer.encode_with_special_tokens("Hello world").unwrap();
        assert_eq!(json!(ids), case["ids"], "{case}");
    }
}

#[test]
fn named_templates_are_chosen_as_transformers_chooses() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "documents"},
    ]});
    let in_config = with_files(&[("tokenizer_config.json", config.to_string().as_str())]).unwrap();
    let in_files = with_files(&[
        ("tokenizer_config.json", r#"{"chat_template": "old"}"#),
        ("chat_template.jinja", "plain"),
        ("additional_chat_templates/rag.jinja", "documents"),
        ("additional_chat_templates/tool_use.jinja", "tools"),
    ])
    .unwrap();
    for tokenizer in [in_config, in_files] {
        let render = |tools: bool, template: Option<&str>| {
            let options = ChatOptions {
                tools: if tools { vec![json!({})] } else { vec![] },
                template: template.map(String::from),
                ..ChatOptions::default()
            };
            tokenizer.apply_chat_template(&[], &options)
        };
        assert_eq!(tokenizer.chat_template_names().len(), 3);
        assert_eq!(render(false, None).unwrap(), "plain");
        assert_eq!(render(true, None).unwrap(), "tools");
        assert_eq!(render(true, Some("rag")).unwrap(), "documents");
        let error = render(false, Some("other")).unwrap_err();
        assert!(
            matches!(&error, Error::NoSuchTemplate { known, .. } if known.len() == 3),
            "{error}"
        );
        // And all of them are saved.
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        let again = Tokenizer::from_dir(folder.path()).unwrap();
        assert_eq!(again.chat_template_names(), tokenizer.chat_template_names());
    }
}

#[test]
fn the_present_is_the_callers() {
    let tokenizer = with_template("{{ strftime_now('%Y-%m-%d') }}");
    let options = ChatOptions {
        // Noon, so that it is the same day wherever the test runs, nearly.
        now: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_049_600)),
        ..ChatOptions::default()
    };
    assert_eq!(
        tokenizer.apply_chat_template(&[], &options).unwrap(),
        "2023-11-15"
    );
    let bad = with_template("{{ strftime_now('%Q') }}");
    let error = bad.apply_chat_template(&[], &options).unwrap_err();
    assert!(error.to_string().contains("%Q"), "{error}");
}

/// A template is a program of strangers: whatever it does ends soon, in an error.
#[test]
fn hostile_templates_end() {
    let cases = [
        (
            "a loop",
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        ),
        (
            "a macro that calls itself",
            "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        ),
        (
            "a macro that calls itself twice",
            "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        ),
        (
            "a long output",
            "{% for i in range(1000) %}{{ 'x' * 1000000 }}{% endfor %}",
        ),
        ("a long repetition", "{{ 'x' * 100000000000 }}"),
        (
            "a capture that doubles",
            "{% set ns = namespace(x='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}\
             {% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        ),
        (
            "a wide indent",
            "{{ messages | tojson(indent=99999999) }}{{ [[[1]]] | tojson(indent=-1) }}",
        ),
    ];
    for (what, template) in cases {
        let start = Instant::now();
        let error = with_template(template)
            .apply_chat_template(&[ChatMessage::new("user", "?")], &ChatOptions::default())
            .unwrap_err();
        assert!(
            matches!(error, Error::ChatTemplate { .. }),
            "{what}: {error}"
        );
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
    }
    let long = "x".repeat(2 << 20);
    let error = with_files(&[("chat_template.jinja", &long)]).err().unwrap();
    assert!(matches!(error, Error::TemplateTooLong { .. }), "{error}");
}
