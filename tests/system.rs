//! `RlhfSystem` on small models with random weights, and what it says of folders that will not do.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use rlhf::prelude::*;
use rlhf::{Error, Result, core, models};

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens/models")
        .join(name)
}

fn system() -> RlhfSystem {
    RlhfSystem::from_pretrained(model("gpt2"), model("gpt2_rm")).unwrap()
}

fn error(base: impl AsRef<Path>, reward: impl AsRef<Path>) -> Error {
    match RlhfSystem::from_pretrained(base, reward) {
        Ok(_) => panic!("loaded"),
        Err(error) => error,
    }
}

/// A copy of a model's folder, to be damaged.
fn copied(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(model(name)).unwrap() {
        let path = entry.unwrap().path();
        let to = dir.path().join(path.file_name().unwrap());
        fs::write(to, fs::read(&path).unwrap()).unwrap();
    }
    dir
}

/// Replaces `from` in a text file, which must be there.
fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{} has no {from}", path.display());
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn texts_are_written_and_judged() {
    let short = GenerationConfig {
        max_new_tokens: 8,
        sampling: SamplingConfig::greedy(),
        ..GenerationConfig::default()
    };
    let system = system().with_generation(short).unwrap();
    let prompt = "The quick brown fox";
    let text = system.generate_text(prompt).unwrap();
    assert!(!text.is_empty());
    assert_eq!(system.generate_text(prompt).unwrap(), text, "greedy");
    let reward = system.get_reward_for(prompt, &text).unwrap();
    assert!(reward.is_finite());
    assert_ne!(reward, system.get_reward_for(prompt, "").unwrap());
    // Alone, a text is scored by its own last token, whatever part of it is called the prompt.
    let whole = system.get_reward(prompt).unwrap();
    assert_eq!(whole, system.get_reward_for(prompt, "").unwrap());
}

#[test]
fn a_stream_gives_the_text_in_whole_characters() {
    for stop_strings in [vec![], vec!["e".to_string()]] {
        let config = GenerationConfig {
            max_new_tokens: 40,
            stop_strings,
            ..GenerationConfig::default()
        };
        let system = || system().with_generation(config.clone()).unwrap();
        let text = system().generate_text("The quick brown fox").unwrap();
        let system = system();
        let stream = system.generate_text_stream("The quick brown fox").unwrap();
        let pieces: Vec<String> = stream.collect::<Result<_>>().unwrap();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() > 1 || config.stop_strings.len() == 1);
        assert!(config.stop_strings.iter().all(|stop| !text.contains(stop)));
    }
    assert!(system().generate_text_stream("").is_err());
}

#[test]
fn sampling_follows_the_seed() {
    let sampled = |seed| -> Result<Vec<String>> {
        let config = GenerationConfig {
            max_new_tokens: 12,
            ..GenerationConfig::default()
        };
        let system = system().with_generation(config)?.with_seed(seed);
        (0..3).map(|_| system.generate_text("A dog")).collect()
    };
    let texts = sampled(1).unwrap();
    assert_eq!(texts, sampled(1).unwrap());
    assert_ne!(texts, sampled(2).unwrap());
    assert_ne!(
        texts[0], texts[1],
        "each call has random numbers of its own"
    );
    assert_eq!(system().generation().stop_token_ids, [0]);
}

#[test]
fn a_reward_model_without_a_tokenizer_uses_that_of_the_base() {
    let reward = copied("gpt2_rm");
    fs::remove_file(reward.path().join("tokenizer.json")).unwrap();
    let borrowing = RlhfSystem::from_pretrained(model("gpt2"), reward.path()).unwrap();
    let text = "The quick brown fox";
    let expected = system().get_reward(text).unwrap();
    assert_eq!(borrowing.get_reward(text).unwrap(), expected);
}

#[test]
fn scores_are_on_the_scale_that_the_folder_keeps() {
    let reward = copied("gpt2_rm");
    let scale = rlhf::reward::ScoreNormalizer {
        mean: 0.25,
        deviation: 0.5,
    };
    scale.save(reward.path()).unwrap();
    let scaled = RlhfSystem::from_pretrained(model("gpt2"), reward.path()).unwrap();
    let text = "The quick brown fox";
    let expected = (system().get_reward(text).unwrap() - 0.25) / 0.5;
    assert!((scaled.get_reward(text).unwrap() - expected).abs() < 1e-6);
    assert_eq!(scaled.score_normalizer(), scale);
    fs::write(reward.path().join("score_normalizer.json"), "{}").unwrap();
    assert!(RlhfSystem::from_pretrained(model("gpt2"), reward.path()).is_err());
}

#[test]
fn folders_that_will_not_do() {
    let nowhere = error("no/such/folder", model("gpt2_rm"));
    assert!(
        matches!(nowhere, Error::Models(models::Error::Io { .. })),
        "{nowhere}"
    );
    assert!(nowhere.to_string().contains("no/such/folder"), "{nowhere}");

    let two_labels = error(model("gpt2"), model("gpt2_cls2"));
    assert!(
        matches!(two_labels, Error::NotARewardModel { num_labels: 2, .. }),
        "{two_labels}"
    );

    let unknown = copied("gpt2");
    replace(
        &unknown.path().join("config.json"),
        r#""gpt2""#,
        r#""hal9000""#,
    );
    let unknown = error(unknown.path(), model("gpt2_rm"));
    let Error::Models(models::Error::UnknownArchitecture { found, .. }) = unknown else {
        panic!("{unknown}")
    };
    assert_eq!(found, "hal9000");

    let truncated = copied("gpt2");
    let weights = truncated.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let truncated = error(truncated.path(), model("gpt2_rm"));
    assert!(
        matches!(truncated, Error::Models(models::Error::Safetensors { .. })),
        "{truncated}"
    );
}

#[test]
fn a_tokenizer_larger_than_its_model_is_refused() {
    let base = copied("gpt2");
    let tokenizer = base.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&fs::read(&tokenizer).unwrap()).unwrap();
    json["model"]["vocab"]["beyond"] = 768.into();
    fs::write(&tokenizer, json.to_string()).unwrap();
    let refused = error(base.path(), model("gpt2_rm"));
    let Error::TokenizerMismatch { path, source } = refused else {
        panic!("{refused}")
    };
    assert_eq!(path, base.path());
    let expected = (768, 768);
    assert!(
        matches!(source, models::Error::VocabularyTooSmall { largest_id, vocab_size }
            if (largest_id, vocab_size) == expected),
        "{source}"
    );
    // The reward model's is checked against the reward model.
    let reward = copied("gpt2_rm");
    fs::copy(&tokenizer, reward.path().join("tokenizer.json")).unwrap();
    let refused = error(model("gpt2"), reward.path());
    let Error::TokenizerMismatch { path, .. } = refused else {
        panic!("{refused}")
    };
    assert_eq!(path, reward.path());
}

#[test]
fn texts_that_will_not_do() {
    let system = system();
    assert!(matches!(
        system.generate_text(""),
        Err(Error::NoTokens { what: "prompt", .. })
    ));
    assert!(matches!(
        system.get_reward(""),
        Err(Error::NoTokens { what: "text", .. })
    ));
    let long = "fox ".repeat(200);
    let too_long = |error| {
        matches!(
            error,
            Error::Core(core::Error::TooLong { max_length: 64, .. })
        )
    };
    assert!(too_long(system.generate_text(&long).unwrap_err()));
    assert!(too_long(system.get_reward(&long).unwrap_err()));
}

#[test]
fn generation_configs_that_will_not_do() {
    let refused = |config| match system().with_generation(config) {
        Err(Error::Core(core::Error::InvalidConfig { field, .. })) => field,
        Ok(_) | Err(_) => panic!("not refused"),
    };
    let several = GenerationConfig {
        samples_per_prompt: 2,
        ..GenerationConfig::default()
    };
    assert_eq!(refused(several), "generation.samples_per_prompt");
    let none = GenerationConfig {
        max_new_tokens: 0,
        ..GenerationConfig::default()
    };
    assert_eq!(refused(none), "generation.max_new_tokens");
}
