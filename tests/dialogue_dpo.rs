//! The example itself on a tiny model: what it writes, and what it does not compute twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/child_process.rs"]
mod child_process;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use child_process::{example, text};
use rlhf::models::{CausalLm, LoadOptions, Tokenizer};

const MODEL: &str = "tests/goldens/models/gpt2";

fn run(dir: &Path, options: &[&str]) -> Output {
    Command::new(example("dialogue_dpo"))
        .args(["--model", MODEL, "--show", "1"])
        .arg("--data")
        .arg(dir)
        .arg("--out")
        .arg(dir.join("out"))
        .args(options)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

fn conversations(dir: &Path) {
    let row = |i: usize| {
        format!(
            r#"{{"prompt": [{{"role": "user", "content": "{i}?"}}],
                 "chosen": [{{"role": "assistant", "content": "yes {i}"}}],
                 "rejected": [{{"role": "assistant", "content": "no"}}]}}"#
        )
        .replace('\n', " ")
    };
    let rows: Vec<String> = (0..8).map(row).collect();
    std::fs::write(dir.join("train.jsonl"), rows.join("\n")).unwrap();
    std::fs::write(dir.join("valid.jsonl"), rows[..2].join("\n")).unwrap();
}

#[test]
fn an_adapter_a_model_and_a_table() {
    let dir = tempfile::tempdir().unwrap();
    conversations(dir.path());
    let out = dir.path().join("out");

    let first = text(&run(dir.path(), &["--loss", "ipo"]));
    assert!(
        first.contains("8 of 8 pairs") && first.contains("before"),
        "{first}"
    );
    let mut model = CausalLm::from_pretrained(out.join("base"), &LoadOptions::default()).unwrap();
    model.load_adapter(out.join("adapter")).unwrap();
    assert!(
        Tokenizer::from_dir(out.join("adapter"))
            .unwrap()
            .has_chat_template()
    );

    // The reference's scores are there already.
    let scores = || -> Vec<(PathBuf, std::time::SystemTime)> {
        let files = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap());
        let files = files.filter(|f| f.file_name().to_string_lossy().ends_with(".ref"));
        let mut files: Vec<_> = files
            .map(|f| (f.path(), f.metadata().unwrap().modified().unwrap()))
            .collect();
        files.sort();
        files
    };
    let before = scores();
    assert_eq!(before.len(), 2);
    text(&run(dir.path(), &["--loss", "simpo", "--merge"]));
    assert_eq!(scores(), before);
    CausalLm::from_pretrained(out.join("model"), &LoadOptions::default()).unwrap();

    let all = text(&run(dir.path(), &["--loss", "all"]));
    let table = all.split("accuracy   margin").nth(1).unwrap();
    for name in [
        "sigmoid",
        "bco_pair_shift",
        "aot",
        "orpo",
        "mpo",
        "kto",
        "apo_zero_unpaired",
    ] {
        assert!(table.contains(&format!("\n{name} ")), "{name} in {all}");
    }

    let unknown = run(dir.path(), &["--loss", "none"]);
    let errors = String::from_utf8_lossy(&unknown.stderr);
    assert!(
        !unknown.status.success() && errors.contains("known are sigmoid"),
        "{errors}"
    );
}
