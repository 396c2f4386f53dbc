//! A tokenizer from texts.

use std::error::Error;
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::task::{CUE, INSTRUCTION, Pair};

const END_OF_TEXT: &str = "<|endoftext|>";

/// A byte-level BPE of `vocab` tokens, written as `tokenizer.json` and `tokenizer_config.json`.
pub fn train_tokenizer(pairs: &[Pair], vocab: usize, out: &Path) -> Result<(), Box<dyn Error>> {
    let boxed = |error: tokenizers::Error| -> Box<dyn Error> { error };
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        tokenizers::NormalizerWrapper,
        _,
        tokenizers::PostProcessorWrapper,
        _,
    >::default()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
    .with_decoder(Some(ByteLevel::new(false, true, true)))
    .build()
    .map_err(boxed)?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let texts = pairs
        .iter()
        .map(|p| format!("{INSTRUCTION}{}{CUE} {}", p.text, p.summary));
    tokenizer.train(&mut trainer, texts).map_err(boxed)?;
    tokenizer
        .save(out.join("tokenizer.json"), false)
        .map_err(boxed)?;
    let settings = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": false,
    });
    std::fs::write(
        out.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&settings)?,
    )?;
    Ok(())
}
