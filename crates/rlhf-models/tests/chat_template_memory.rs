//! Templates that would fill the memory end in an error before they do, and honest ones on long
//! conversations do not. Memory is the process's, so that this file has one test of each.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use rlhf_models::{ChatMessage, ChatOptions, Error, Tokenizer};

const CHATML: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/goldens/tokenizers/chatml"
);

fn with_template(template: &str) -> Result<Tokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    let from = format!("{CHATML}/tokenizer.json");
    std::fs::copy(from, folder.path().join("tokenizer.json")).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    Tokenizer::from_dir(folder.path())
}

/// Most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    1024 * line
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
}

/// A hundred times `statement`, which changes `ns.x`.
fn again(first: &str, statement: &str, after: &str) -> String {
    format!(
        "{{% set ns = namespace(x={first}) %}}{{% for i in range(100) %}}\
         {{% set ns.x = {statement} %}}{{% endfor %}}{after}"
    )
}

#[test]
fn what_grows_without_bounds_is_refused() {
    let unrolled: String = (0..60)
        .map(|i| format!("{{% set x{} = x{i} ~ x{i} %}}", i + 1))
        .collect();
    let large = "{% set x = 'x' * 1000000 %}";
    let many: String = (0..3000)
        .map(|i| format!("{{% set a{i} = x ~ '{i}' %}}"))
        .collect();
    let cases = [
        ("~", again("'x'", "ns.x ~ ns.x", "")),
        ("+", again("'x'", "ns.x + ns.x", "")),
        ("no loop", format!("{{% set x0 = 'x' %}}{unrolled}")),
        (
            "a macro",
            "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('x') }}".into(),
        ),
        (
            "one expression",
            format!("{large}{{% set y = x{} %}}", " ~ x".repeat(100_000)),
        ),
        (
            "a long comparison",
            format!("{{{{ 1{} }}}}", " and 1".repeat(150_000)),
        ),
        (
            "many filters",
            format!("{{{{ 1{} }}}}", "|abs".repeat(200_000)),
        ),
        (
            "many attributes",
            format!("{{{{ 1{} }}}}", ".a".repeat(400_000)),
        ),
        (
            "many signs",
            format!("{{{{ {}1 }}}}", "not ".repeat(200_000)),
        ),
        (
            "many branches",
            format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(50_000)),
        ),
        ("many values", format!("{large}{many}")),
        (
            "lists",
            again("[1]", "ns.x + ns.x", "{{ ns.x|list|length }}"),
        ),
        (
            "a list within a list",
            again("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
        ),
        ("a tuple", again("1", "ns.x, ns.x", "{{ ns.x }}")),
        (
            "a dictionary",
            again("1", "dict(a=ns.x, b=ns.x)", "{{ ns.x ~ '' }}"),
        ),
        ("pairs", again("[1]", "ns.x|zip(ns.x)|list", "{{ ns.x }}")),
        (
            "namespaces within lists",
            "{% set a = namespace() %}{% set b = namespace() %}{% set a.x = [b, b] %}\
             {% set b.x = [a, a] %}{{ a ~ '' }}"
                .into(),
        ),
        ("join", "{{ range(30000)|join('x' * 100000) }}".into()),
        (
            "join, a method",
            "{{ ('x' * 100000).join(range(30000)) }}".into(),
        ),
        (
            "replace",
            "{{ ('x' * 100000)|replace('x', 'y' * 100000) }}".into(),
        ),
        (
            "replace, a method",
            "{{ ('x' * 100000).replace('', 'y' * 100000) }}".into(),
        ),
        (
            "indent",
            "{{ ('x\\n' * 100000)|indent(width=100000) }}".into(),
        ),
        ("format", "{{ '%999999999d'|format(1) }}".into()),
        ("format, a method", "{{ '{:>999999999}'.format(1) }}".into()),
        ("batch", "{{ [1]|batch(999999999, 0) }}".into()),
        ("slice", "{{ [1]|slice(999999999) }}".into()),
        (
            "captured text",
            format!(
                "{{% set x %}}{{% for i in range(100000) %}}{}{{% endfor %}}{{% endset %}}",
                "y".repeat(1000)
            ),
        ),
    ];
    let before = peak();
    for (what, template) in cases {
        let start = Instant::now();
        let messages = [ChatMessage::new("user", "?")];
        let error = with_template(&template)
            .and_then(|t| t.apply_chat_template(&messages, &ChatOptions::default()))
            .err()
            .unwrap_or_else(|| panic!("{what} is rendered"));
        assert!(
            matches!(error, Error::ChatTemplate { .. }),
            "{what}: {error}"
        );
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        let grown = peak() - before;
        assert!(grown < 512 << 20, "{what}: {} MiB more", grown >> 20);
    }
}

#[test]
fn long_conversations_are_rendered() {
    let template = "{% set ns = namespace(text='') %}{% for m in messages %}\
        {% if loop.index0 != messages|length - 1 and m['role'] in ['user', 'assistant'] %}\
        {% set ns.text = ns.text + '<' ~ m.role ~ '>' + m['content'].strip() %}\
        {% else %}{% set ns.text = ns.text + m.content.split('</think>')[-1] %}{% endif %}\
        {% endfor %}{{ ns.text }}";
    let messages: Vec<ChatMessage> = (0..2000)
        .map(|i| ChatMessage::new(["user", "assistant"][i % 2], "many words ".repeat(50)))
        .collect();
    let expected: String = (0..2000)
        .map(|i| match i {
            1999 => "many words ".repeat(50),
            i => format!(
                "<{}>{}",
                ["user", "assistant"][i % 2],
                "many words ".repeat(50).trim()
            ),
        })
        .collect();
    let start = Instant::now();
    let text = with_template(template)
        .unwrap()
        .apply_chat_template(&messages, &ChatOptions::default())
        .unwrap();
    assert!(text == expected, "{} bytes", text.len());
    assert!(start.elapsed() < Duration::from_secs(20));
}
