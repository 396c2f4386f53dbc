//! Datasets become the token ids that TRL makes of them; `dpo.json` is TRL 1.16's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use rlhf_models::core::{Preference, Sequence};
use rlhf_models::data::{
    EncodeOptions, Encoded, Format, FromRow, LabelledSequence, LintKind, Overlong, Rows,
    UnpairedSequence, encode, lint,
};
use rlhf_models::{Error, Tokenizer};
use serde_json::{Value, json};

fn tokenizer(name: &str) -> Tokenizer {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/tokenizers");
    Tokenizer::from_dir(format!("{folder}/{name}")).unwrap()
}

fn file(rows: &[Value]) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new()
        .suffix(".jsonl")
        .tempfile()
        .unwrap();
    for row in rows {
        writeln!(file, "{row}").unwrap();
    }
    file
}

fn encoded<T: FromRow>(rows: &[Value], options: &EncodeOptions) -> Encoded<T> {
    let file = file(rows);
    encode(
        Rows::open(file.path()).unwrap(),
        &tokenizer("chatml"),
        options,
    )
    .unwrap()
}

fn ids(value: &Value) -> Vec<i64> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn preference_pairs_have_trls_token_ids() {
    let case: Value = serde_json::from_str(include_str!("goldens/data/dpo.json")).unwrap();
    for (kind, count) in [
        ("pairs", 12),
        ("boundary_pairs", 3),
        ("conversational_pairs", 2),
        ("implicit_prompt_pairs", 3),
    ] {
        let rows = case["expect"][kind].as_array().unwrap();
        let data: Encoded<Preference> = encoded(rows, &EncodeOptions::default());
        assert_eq!((rows.len(), data.examples.len()), (count, count));
        for (row, pair) in rows.iter().zip(&data.examples) {
            assert_eq!(
                pair.prompt.to_vec(),
                ids(&row["prompt_ids"]),
                "{kind}: {row}"
            );
            assert_eq!(pair.chosen, ids(&row["chosen_ids"]), "{kind}: {row}");
            assert_eq!(pair.rejected, ids(&row["rejected_ids"]), "{kind}: {row}");
        }
    }
}

#[test]
fn conversations_without_a_prompt_are_split_by_messages() {
    let [user, good, bad] = [
        ("user", "Hi!"),
        ("assistant", "Yes, of course."),
        ("assistant", "No."),
    ]
    .map(|(role, content)| json!({"role": role, "content": content}));
    let implicit = json!({"chosen": [user, good], "rejected": [user, bad]});
    let explicit = json!({"prompt": [user], "chosen": [good], "rejected": [bad]});
    let default = EncodeOptions::default();
    let implicit = encoded::<Preference>(&[implicit], &default);
    assert_eq!(implicit, encoded(&[explicit], &default));
}

#[test]
fn every_format_becomes_what_its_trainer_takes() {
    let t = tokenizer("chatml");
    let default = EncodeOptions::default();
    let eos = t.eos_token_id().unwrap();
    let with_eos = |text: &str| [t.encode(text).unwrap(), vec![eos]].concat();
    let all = |s: &Sequence| s.tokens().collect::<Vec<_>>();

    let text: Encoded<Sequence> = encoded(&[json!({"text": "Hello world"})], &default);
    let sequence = &text.examples[0];
    assert_eq!(
        (sequence.prompt.len(), all(sequence)),
        (1, with_eos("Hello world"))
    );

    let turns = json!([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Ho"}]);
    let other_names =
        json!([{"from": "user", "value": "Hi!"}, {"from": "assistant", "value": "Ho"}]);
    for row in [
        json!({"messages": turns}),
        json!({"conversations": other_names}),
    ] {
        let chat: Encoded<Sequence> = encoded(&[row], &default);
        let text = t.decode(&all(&chat.examples[0]), false).unwrap();
        assert!(
            text.ends_with("user\nHi!<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"),
            "{text}"
        );
    }

    let row = json!({"prompt": "Hello", "completion": " world", "source": 7});
    let pair: Encoded<Sequence> = encoded(&[row], &default);
    assert_eq!(pair.examples[0].prompt.to_vec(), t.encode("Hello").unwrap());
    assert_eq!(all(&pair.examples[0]), with_eos("Hello world"));

    let row = json!({"prompt": "Hello", "completion": " world", "label": false});
    let unpaired: Encoded<UnpairedSequence> = encoded(&[row], &default);
    assert_eq!(unpaired.examples[0].sequence, pair.examples[0]);
    assert!(!unpaired.examples[0].desirable);

    let labelled: Encoded<LabelledSequence> =
        encoded(&[json!({"text": "Hello", "label": 2})], &default);
    let example = &labelled.examples[0];
    assert_eq!(
        all(&example.sequence),
        t.encode("Hello").unwrap(),
        "no EOS, as TRL"
    );
    assert_eq!(example.label, 2.0);

    let prompts: Encoded<Arc<[i64]>> = encoded(&[json!({"prompt": "Hello"})], &default);
    assert_eq!(prompts.examples[0].to_vec(), t.encode("Hello").unwrap());
    let ask = json!({"prompt": [{"role": "user", "content": "Hi!"}]});
    let prompts: Encoded<Arc<[i64]>> = encoded(&[ask], &default);
    let text = t.decode(&prompts.examples[0], false).unwrap();
    assert!(text.ends_with("<|im_start|>assistant\n"), "{text}");
    let begun = json!({"prompt": turns});
    let prompts: Encoded<Arc<[i64]>> = encoded(&[begun], &default);
    let text = t.decode(&prompts.examples[0], false).unwrap();
    assert!(text.ends_with("<|im_start|>assistant\nHo"), "{text}");
}

#[test]
fn equal_prompts_share_their_memory() {
    let row = |prompt: &str, n: usize| json!({"prompt": prompt, "completion": format!(" {n}")});
    let data: Encoded<Sequence> = encoded(
        &[row("a b", 1), row("c", 2), row("a b", 3)],
        &EncodeOptions::default(),
    );
    let [a, b, c] = [0, 1, 2].map(|i| &data.examples[i].prompt);
    assert!(Arc::ptr_eq(a, c) && !Arc::ptr_eq(a, b));
}

#[test]
fn bos_comes_once_and_eos_comes_once() {
    let t = tokenizer("llama3_style");
    let rows = file(&[
        json!({"prompt": "Hello", "completion": " world"}),
        json!({"prompt": "Hello", "completion": " world<|eot_id|>"}),
    ]);
    let data: Encoded<Sequence> = encode(
        Rows::open(rows.path()).unwrap(),
        &t,
        &EncodeOptions::default(),
    )
    .unwrap();
    let expected = [
        t.encode_with_special_tokens("Hello world").unwrap(),
        vec![5],
    ]
    .concat();
    for sequence in &data.examples {
        assert_eq!(sequence.tokens().collect::<Vec<_>>(), expected);
        assert_eq!(sequence.prompt[0], 0);
    }
    let open = EncodeOptions {
        append_eos: false,
        ..EncodeOptions::default()
    };
    let data: Encoded<Sequence> = encode(Rows::open(rows.path()).unwrap(), &t, &open).unwrap();
    assert_ne!(data.examples[0].response.last(), Some(&5));
}

#[test]
fn long_rows_are_dropped_or_cut_and_counted() {
    let row = json!({"prompt": "one two three four", "chosen": " a b c d e f", "rejected": " x"});
    let short = json!({"prompt": "one", "chosen": " a", "rejected": " b"});
    let none = json!({"prompt": "one", "chosen": "", "rejected": " b"});
    let with = |max_tokens, overlong, rows: &[Value]| {
        let options = EncodeOptions {
            max_tokens,
            overlong,
            append_eos: false,
        };
        encoded::<Preference>(rows, &options)
    };
    let rows = [row.clone(), short, none];
    let whole = with(None, Overlong::Drop, &rows);
    assert_eq!(
        (whole.rows.as_slice(), whole.counts.dropped_empty),
        (&[0, 1][..], 1)
    );
    let full = &whole.examples[0];
    let (p, c) = (full.prompt.len(), full.chosen.len());
    let max = Some(p + c - 2);

    let dropped = with(max, Overlong::Drop, &rows);
    assert_eq!(
        (dropped.rows.as_slice(), dropped.counts.dropped_too_long),
        (&[1][..], 1)
    );

    let start = with(max, Overlong::KeepStart, &rows);
    let cut = &start.examples[0];
    assert_eq!((start.counts.cut, &cut.prompt), (1, &full.prompt));
    assert_eq!(
        (&cut.chosen[..], &cut.rejected),
        (&full.chosen[..c - 2], &full.rejected)
    );

    let end = with(max, Overlong::KeepEnd, &rows);
    let cut = &end.examples[0];
    assert_eq!((end.counts.cut, &cut.prompt[..]), (1, &full.prompt[2..]));
    assert_eq!((&cut.chosen, &cut.rejected), (&full.chosen, &full.rejected));

    let nothing_left = with(Some(p), Overlong::KeepStart, &[row]);
    assert_eq!(
        (
            nothing_left.counts.dropped_too_long,
            nothing_left.counts.cut
        ),
        (1, 0)
    );
}

#[test]
fn errors_name_file_line_and_field() {
    let good = json!({"prompt": "p", "chosen": "c", "rejected": "r"});
    let cases = [
        (json!({"prompt": "p", "chosen": "c"}), "rejected"),
        (
            json!({"prompt": 3, "chosen": "c", "rejected": "r"}),
            "prompt",
        ),
        (
            json!({"prompt": "p", "chosen": "c", "rejected": null}),
            "rejected",
        ),
        (
            json!({"prompt": [{"role": "user", "content": "c"}, {"content": "c"}], "chosen": "c", "rejected": "r"}),
            "prompt[1]",
        ),
        (
            json!({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "x"}),
            "margin",
        ),
    ];
    for (bad, field) in cases {
        let file = file(&[good.clone(), bad.clone()]);
        let error = Rows::open(file.path())
            .unwrap()
            .last()
            .unwrap()
            .unwrap_err();
        let text = error.to_string();
        let start = format!("{}:2: field `{field}`", file.path().display());
        assert!(text.starts_with(&start), "{text}");
    }
    // What only the tokenizer or its template can tell has a place, too.
    let mixed = json!({"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]});
    let whole = json!({"prompt": "p", "completion": "c"});
    let file = file(&[whole, mixed]);
    let error = encode::<Sequence>(
        Rows::open(file.path()).unwrap(),
        &tokenizer("chatml"),
        &EncodeOptions::default(),
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains(":2: prompt and answer must both"),
        "{error}"
    );
}

#[test]
fn unknown_and_wrong_formats_say_what_there_is() {
    let unknown = file(&[json!({"question": "q", "answer": null})]);
    let text = Rows::open(unknown.path()).err().unwrap().to_string();
    for part in [
        "`question`",
        "preference: `chosen`, `rejected`",
        "`text` or `messages`",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let rows = Rows::open(file(&[json!({"prompt": "p"})]).path()).unwrap();
    assert_eq!(rows.format(), Format::PromptOnly);
    let error = encode::<Preference>(rows, &tokenizer("chatml"), &EncodeOptions::default());
    let error = error.unwrap_err();
    assert!(
        error.to_string().contains("the dataset is prompt-only"),
        "{error}"
    );
    let absent = Rows::open("/nowhere/train.jsonl").err().unwrap();
    assert!(matches!(absent, Error::Io { .. }));
}

#[test]
fn lint_finds_what_would_train_something_else() {
    let t = tokenizer("chatml");
    let options = EncodeOptions {
        max_tokens: Some(40),
        ..EncodeOptions::default()
    };
    let good = json!({"prompt": "Say hi.", "chosen": " hi", "rejected": " no"});
    let rows = [
        good.clone(),
        json!({"prompt": "Name a colour: ", "chosen": "blue", "rejected": "red"}),
        json!({"prompt": "", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "Say ho.", "chosen": " hi", "rejected": ""}),
        json!({"prompt": "Say hu.", "chosen": " hu", "rejected": " hu"}),
        good,
        json!({"prompt": "<|endoftext|><|endoftext|>Hi.", "chosen": " hi", "rejected": " no"}),
        json!({"prompt": "Count.", "chosen": " 1 2 3 4 5 6 7 8 9".repeat(9), "rejected": " no"}),
    ];
    let rows = file(&rows);
    let report = lint(Rows::open(rows.path()).unwrap(), &t, &options).unwrap();
    let found: BTreeMap<LintKind, (usize, usize)> = report
        .findings
        .iter()
        .map(|finding| (finding.kind, (finding.count, finding.examples[0].line)))
        .collect();
    let expected = [
        (LintKind::DoubleBos, (1, 7)),
        (LintKind::Boundary, (1, 2)),
        (LintKind::EmptyPrompt, (1, 3)),
        (LintKind::EmptyCompletion, (1, 4)),
        (LintKind::ChosenIsRejected, (1, 5)),
        (LintKind::Duplicate, (1, 6)),
        (LintKind::TooLong, (1, 8)),
    ];
    assert_eq!(found, BTreeMap::from(expected), "{report}");
    assert_eq!((report.rows, report.format), (8, Some(Format::Preference)));
    let text = report.to_string();
    assert!(
        text.contains(&format!("{}:2", rows.path().display())),
        "{text}"
    );

    // A tokenizer that adds a BOS token to a text that has one.
    let llama = tokenizer("llama3_style");
    let rows = file(&[
        json!({"text": "<|begin_of_text|>Hello"}),
        json!({"text": "Hello"}),
    ]);
    let open = EncodeOptions {
        append_eos: false,
        ..EncodeOptions::default()
    };
    let report = lint(Rows::open(rows.path()).unwrap(), &llama, &open).unwrap();
    assert_eq!(report.count(LintKind::DoubleBos), 1, "{report}");
    assert_eq!(report.count(LintKind::MissingEos), 2, "{report}");

    // Templates end a turn with a token and a line break, which is an end; if it is a stop token.
    let turns = json!([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Ho"}]);
    let rows = file(&[json!({"messages": turns})]);
    let count = |tokenizer: &Tokenizer| {
        let rows = Rows::open(rows.path()).unwrap();
        let report = lint(rows, tokenizer, &EncodeOptions::default()).unwrap();
        report.count(LintKind::MissingEos)
    };
    assert_eq!(
        count(&t),
        1,
        "<|im_end|> does not stop generation with this tokenizer"
    );
    let folder = tempfile::tempdir().unwrap();
    t.save(folder.path()).unwrap();
    std::fs::write(
        folder.path().join("generation_config.json"),
        r#"{"eos_token_id": [0, 3]}"#,
    )
    .unwrap();
    assert_eq!(count(&Tokenizer::from_dir(folder.path()).unwrap()), 0);
}

#[cfg(feature = "parquet")]
mod parquet {
    use super::*;
    use rlhf_models::data::{Example, Text};

    fn path(name: &str) -> String {
        format!("{}/tests/goldens/data/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn the_same_as_from_jsonl() {
        let read = |name: &str| {
            let rows = Rows::open(path(name)).unwrap();
            encode::<Preference>(rows, &tokenizer("chatml"), &EncodeOptions::default()).unwrap()
        };
        let (mut parquet, jsonl) = (read("preference.parquet"), read("preference.jsonl"));
        let margins: Vec<_> = parquet
            .examples
            .iter_mut()
            .map(|pair| pair.margin.take())
            .collect();
        assert_eq!(parquet, jsonl);
        assert_eq!(margins, [Some(0.0), None, Some(1.0), Some(1.5)]);
    }

    #[test]
    fn lists_of_messages() {
        let rows: Vec<_> = Rows::open(path("conversations.parquet"))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        assert_eq!(rows.len(), 3);
        let Example::PromptCompletion {
            prompt: Text::Chat(prompt),
            ..
        } = &rows[2].example
        else {
            panic!("{:?}", rows[2]);
        };
        assert_eq!(
            (prompt[0].role(), prompt[1].text()),
            ("system", Some("Hi 2!"))
        );
        assert_eq!((rows[0].tools.len(), rows[2].tools.len()), (0, 1));
    }

    /// One byte of a file wrong, here and there: an error or other rows, nothing worse.
    #[test]
    fn damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let bad = folder.path().join("bad.parquet");
        let mut errors = 0;
        for name in ["preference.parquet", "conversations.parquet"] {
            let good = std::fs::read(path(name)).unwrap();
            for at in (0..good.len()).step_by(7) {
                let mut bytes = good.clone();
                bytes[at] ^= if at % 2 == 0 { 0xff } else { 0x08 };
                std::fs::write(&bad, &bytes).unwrap();
                match Rows::open(&bad) {
                    Ok(rows) => errors += usize::from(rows.take(100).any(|row| row.is_err())),
                    Err(_) => errors += 1,
                }
            }
            for length in [0, 4, 8, good.len() / 2, good.len() - 1] {
                std::fs::write(&bad, &good[..length]).unwrap();
                assert!(Rows::open(&bad).is_err(), "{length} bytes");
            }
        }
        assert!(errors > 20, "{errors}");
    }
}
