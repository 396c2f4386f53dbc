//! Whatever a tokenizer's folder or a dataset holds, the end is an error, soon and in little
//! memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rlhf_models::data::{EncodeOptions, Rows, lint, split_prompt};
use rlhf_models::{ChatEnd, ChatMessage, ChatOptions, Error, Tokenizer};

const CHATML: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/goldens/tokenizers/chatml"
);

/// Held by the tests that measure memory, which is the whole process's.
static MEASURING: Mutex<()> = Mutex::new(());

/// Most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// Writes `before`, `times` times `unit`, and `after`.
fn write(path: &Path, before: &str, unit: &str, times: usize, after: &str) {
    let mut out = BufWriter::new(File::create(path).unwrap());
    out.write_all(before.as_bytes()).unwrap();
    for _ in 0..times {
        out.write_all(unit.as_bytes()).unwrap();
    }
    out.write_all(after.as_bytes()).unwrap();
    out.flush().unwrap();
}

#[test]
fn large_nonsense_is_no_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let _alone = MEASURING.lock().unwrap();
    let before = peak();
    let mega = 1 << 20;
    // 100 MB, then just small enough to be read: text, an array where objects must be, an object
    // of nonsense, and a vocabulary of the wrong type.
    let cases: [(&str, &str, usize, &str); 6] = [
        ("", "nonsense", 100 * mega / 8, ""),
        ("", "nonsense", 60 * mega / 8, ""),
        ("[", "0,", 30 * mega, "0]"),
        ("{\"x\": [", "0,", 30 * mega, "0]}"),
        (
            "{\"model\": {\"vocab\": {\"a\": [",
            "[],",
            20 * mega,
            "[]]}}}",
        ),
        ("{\"model\": {\"merges\": [", "{},", 20 * mega, "{}]}}"),
    ];
    for (i, (start, unit, times, end)) in cases.into_iter().enumerate() {
        write(&path, start, unit, times, end);
        let clock = Instant::now();
        let error = Tokenizer::from_dir(folder.path()).err().unwrap();
        match i {
            0 => assert!(matches!(error, Error::FileTooLarge { .. }), "{error}"),
            _ => assert!(matches!(error, Error::Json { .. }), "{i}: {error}"),
        }
        assert!(error.to_string().len() < 500, "{i}");
        assert!(
            clock.elapsed() < Duration::from_secs(20),
            "{i}: {:?}",
            clock.elapsed()
        );
    }
    // Two buffers at most while one grows.
    assert!(
        peak() - before < 300 << 20,
        "{} MB",
        (peak() - before) >> 20
    );
    let deep = "[".repeat(mega);
    std::fs::write(&path, format!("{{\"model\": {deep}")).unwrap();
    assert!(Tokenizer::from_dir(folder.path()).is_err());
}

#[test]
fn a_line_of_a_gigabyte_is_an_error() {
    let file = tempfile::Builder::new()
        .suffix(".jsonl")
        .tempfile()
        .unwrap();
    // Sparse: a gigabyte of zeros that no disk holds.
    file.as_file().set_len(1 << 30).unwrap();
    let _alone = MEASURING.lock().unwrap();
    let before = peak();
    let error = Rows::open(file.path()).err().unwrap();
    assert!(
        matches!(error, Error::LineTooLong { line: 1, .. }),
        "{error}"
    );
    assert!(peak() - before < 100 << 20);
}

fn chat(role: String, content: String) -> ChatMessage {
    ChatMessage::new(role, content)
}

/// Lines that are nearly datasets.
fn line() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "text",
        "messages",
        "tools",
        "margin",
        "role",
        "content",
    ]);
    let leaf = prop_oneof![
        Just("null".to_string()),
        any::<bool>().prop_map(|b| b.to_string()),
        any::<f64>().prop_map(|x| x.to_string()),
        ".{0,8}".prop_map(|s| serde_json::to_string(&s).unwrap()),
    ];
    let value = leaf.prop_recursive(3, 16, 4, move |inner| {
        let name = prop::sample::select(vec!["role", "content", "tool_calls", "x"]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|v| format!("[{}]", v.join(","))),
            prop::collection::vec((name, inner), 0..4).prop_map(|v| {
                let fields: Vec<_> = v.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
                format!("{{{}}}", fields.join(","))
            }),
        ]
    });
    prop::collection::vec((name, value), 0..5).prop_map(|fields| {
        let fields: Vec<_> = fields
            .iter()
            .map(|(k, v)| format!("\"{k}\": {v}"))
            .collect();
        format!("{{{}}}", fields.join(", "))
    })
}

fn read_all(bytes: &[u8], suffix: &str) {
    let mut file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let tokenizer = Tokenizer::from_dir(CHATML).unwrap();
    if let Ok(rows) = Rows::open(file.path()) {
        let good = rows.take_while(Result::is_ok);
        let _ = lint(good, &tokenizer, &EncodeOptions::default());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_a_dataset_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_all(&bytes, ".jsonl");
    }

    #[test]
    fn any_json_is_a_dataset_or_an_error(lines in prop::collection::vec(line(), 1..4)) {
        read_all(lines.join("\n").as_bytes(), ".jsonl");
    }

    #[test]
    fn any_template_renders_or_is_an_error(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages[0]['role'] }}",
            "{% if m %}", "{% else %}", "{% endif %}", "{% generation %}", "{%- endgeneration -%}",
            "{{ messages | tojson }}", "{% set x = 'é' %}", "{{ x[::-1] ~ x[9:] }}", "{%", "}}", "{{",
            "{{ strftime_now('%Y %é') }}", "{{ messages[::-2] }}", "{% macro f(a) %}", "{% endmacro %}",
            "{{ f(messages) }}", "{{ 1 // 0 }}", "{{ -9223372036854775807 * 9 }}", "text é ",
        ]), 0..10),
        content in ".{0,12}",
    ) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(format!("{CHATML}/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("chat_template.jinja"), pieces.concat()).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_dir(folder.path()) {
            let messages = [chat("user".into(), content.clone()), chat("assistant".into(), content)];
            for end in [ChatEnd::Closed, ChatEnd::OpenFinalMessage] {
                let _ = tokenizer.apply_chat_template(&messages, &ChatOptions::ending(end));
            }
        }
    }

    #[test]
    fn a_split_prompt_loses_nothing(a in "[ab é]{0,6}", b in "[ab é]{0,6}") {
        let (prompt, chosen, rejected) = split_prompt(&a, &b);
        prop_assert_eq!([prompt, chosen].concat(), a.clone());
        prop_assert_eq!([prompt, rejected].concat(), b.clone());
    }
}
